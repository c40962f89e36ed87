"""Merge PEFT adapters of any ranks into one of at most rank 16, and inspect the result.

python examples/merge_adapters.py ADAPTER ADAPTER... MERGED
"""

import sys

import flexlora

*adapters, merged = sys.argv[1:]
modules = flexlora.merge(adapters, merged, rank=16)
lowest = min(modules, key=lambda module: module.energy)
print(f"{len(modules)} modules; at least {lowest.energy:.2%} of each module's energy is kept")
for line in flexlora.check(merged).lines():
    print(line)

# To use it:
#     model = transformers.AutoModelForCausalLM.from_pretrained(BASE_MODEL)
#     model = peft.PeftModel.from_pretrained(model, merged)
