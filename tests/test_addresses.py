import pytest

from flexlora import addresses
from flexlora.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::]", False),
        ("10.0.0.7", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_which_hosts_only_this_machine_reaches(host, loopback):
    assert addresses.is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8090", "127.0.0.1", 8090),
        ("fed.example.org:1", "fed.example.org", 1),
        ("[::1]:65535", "::1", 65535),
        ("localhost:0", "localhost", 0),
    ],
)
def test_an_address_is_split_into_host_and_port(text, host, port):
    assert addresses.split(text) == (host, port)
    assert addresses.parse(text, "--listen", "a:1") == (host, port)
    assert addresses.joined(host, port) == text


@pytest.mark.parametrize(
    "text",
    ["", "8090", "host", "host:", ":80", "a:65536", "a:-1", "a:x", "a:²", "a:８０", "http://a:8"],
)
def test_another_form_is_refused_with_the_option_and_an_example(text):
    assert addresses.split(text) is None
    with pytest.raises(ConfigError, match=r"--listen takes HOST:PORT such as a:1, not '"):
        addresses.parse(text, "--listen", "a:1")


def test_a_free_port_is_refused_where_one_must_be_named():
    with pytest.raises(ConfigError, match="not 'a:0'"):
        addresses.parse("a:0", "--listen", "a:1", free=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_listener_takes_connections_and_its_port_is_in_use(host):
    try:
        listener = addresses.listener(host, 0)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with listener, pytest.raises(OSError):
        addresses.listener(host, listener.getsockname()[1])
