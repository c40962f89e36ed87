"""The app that Flower starts on a node for every message; it passes messages on to the worker."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexlora.deployment.flower import records
from flexlora.deployment.node import worker_socket
from flexlora.errors import FlexloraError, ProtocolError

WORKER = "worker"
"""The key of the path of the worker's socket in the node's config."""

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The client's name and limits; or, after the last round, that it has the adapter."""
    return _passed_on(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss of an adapter on the rows that the client holds out."""
    return _passed_on(message, context)


@app.train()
def turn(message: Message, context: Context) -> Message:
    """Local training in one round."""
    return _passed_on(message, context)


def _passed_on(message: Message, context: Context) -> Message:
    """The worker's response; an error is sent in its header."""
    try:
        if WORKER not in context.node_config:
            raise ProtocolError(
                "This SuperNode's node config has no worker; start it with `flexlora join`."
            )
        path = Path(str(context.node_config[WORKER]))
        header, data = worker_socket.request(path, *records.opened(message.content))
    except FlexloraError as error:
        header, data = {"error": str(error)}, b""
    array = records.payload(data) if data else None
    return Message(records.record(header, array), reply_to=message)
