"""What Flower starts on a node for every message: it passes the message on to the worker."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexlora.deployment.flower import records
from flexlora.deployment.node import worker_socket
from flexlora.errors import FlexloraError, ProtocolError

WORKER = "worker"
"""The key of the node's config under which the path of the worker's socket stands."""

app = ClientApp()


@app.query()
def enrol(message: Message, context: Context) -> Message:
    """Who the client is, and what it can do."""
    return _passed_on(message, context)


@app.train()
def turn(message: Message, context: Context) -> Message:
    """One turn of training."""
    return _passed_on(message, context)


def _passed_on(message: Message, context: Context) -> Message:
    """The worker's answer; a fault is an answer too."""
    try:
        if WORKER not in context.node_config:
            raise ProtocolError(
                "This SuperNode's node config names no worker; start it by `flexlora join`."
            )
        path = Path(str(context.node_config[WORKER]))
        header, data = worker_socket.ask(path, *records.opened(message.content))
    except FlexloraError as error:
        header, data = {"error": str(error)}, b""
    held = records.payload(data) if data else None
    return Message(records.record(header, held), reply_to=message)
