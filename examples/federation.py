"""A federation from Python: six clients of two ranks, two rounds, one adapter for PEFT.

python examples/federation.py [MODEL [FOLDER]]
"""

import sys
from pathlib import Path

import flexlora

changes = [f"model.name='{sys.argv[1]}'"] if len(sys.argv) > 1 else []
folder = sys.argv[2] if len(sys.argv) > 2 else "runs/example"

settings = flexlora.load(Path(__file__).with_name("federation.toml"), changes)
prepared = flexlora.prepare(settings)  # reads the rows, loads the model, assigns the ranks
for event in flexlora.run(prepared, folder):
    if event["event"] == "client":
        loss = event["loss_total"] / max(event["loss_tokens"], 1)
        print(f"round {event['round']}, {event['client']} ({event['rank_type']}): loss {loss:.3f}")
    if event["event"] == "finish":
        print("adapter:", event["adapter"])
