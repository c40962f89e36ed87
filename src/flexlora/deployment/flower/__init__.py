"""Clients on other people's machines, over Flower (https://flower.ai).

Only the files of this folder import Flower. ``grid`` is the federation, ``server_app`` and
``client_app`` are what Flower starts, ``records`` is what travels, ``superlink`` starts Flower's
own processes, ``gate`` stands between them and the network, and ``app`` is all that is sent to
the nodes: a few lines that import ``client_app`` from the library installed there.
"""
