"""Clients on other people's machines, over Flower (https://flower.ai).

Only the files of this folder import Flower. ``grid`` is the transport of the round loop,
``server_app`` and ``client_app`` are the apps that Flower starts, ``records`` the content of its
messages. ``superlink`` and ``supernode`` start Flower's own ``processes``; ``gate``, an allow-list
proxy, stands between them and the network: it bounds ``connections`` and ``bodies``, and asks for
``signatures``. ``app`` is sent to the nodes: a few lines that import ``client_app`` from the
library installed there.
"""
