"""From rows to tokens: corpora, who holds which rows, prompts, and packed token ids."""
