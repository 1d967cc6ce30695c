"""The server: on the loopback address alone, with a token in the address."""

import secrets
import socket
import webbrowser
from pathlib import Path

import uvicorn

from lowmem_db.console import say, warn
from lowmem_db.errors import ConfigError
from lowmem_db.ui.app import build_app
from lowmem_db.ui.security import Guard
from lowmem_db.ui.workplace import Workplace

ADDRESS = "127.0.0.1"


def serve(folder: Path, *, port: int | None, behind_proxy: bool, open_browser: bool) -> None:
    """Serve the page until Ctrl-C; whatever it has started goes on.

    Args:
        folder: A folder of runs, or a run to show.
        port: The port. Default: 8642, or the next that is free.
        behind_proxy: Whether requests come through a proxy under its own name, as on Colab.
        open_browser: Open the page in a browser.

    Raises:
        CheckpointError: The folder holds no run, but is a file.
        ConfigError: The port is in use.
    """
    is_of_run = (folder / "config.yaml").is_file()
    place = Workplace(folder.absolute().parent if is_of_run else folder)
    path = f"/run/{place.open(folder)}" if is_of_run else "/"
    with listen(port) as listener:
        number = listener.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = Guard(build_app(place), token, number, behind_proxy=behind_proxy)
        address = f"http://{ADDRESS}:{number}{path}?token={token}"
        say(f"the page is at {address}")
        say("closing it, or Ctrl-C here, stops no run")
        if open_browser and not behind_proxy and not webbrowser.open(address):
            warn("no browser was found; open the address above")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="off", ws="none")
        uvicorn.Server(config).run(sockets=[listener])


def listen(port: int | None) -> socket.socket:
    """Return a socket that listens on the loopback address.

    Raises:
        ConfigError: The port is in use.
    """
    usual = 8642
    for number in (usual, 0) if port is None else (port,):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, number))
            listener.listen()
        except OSError:
            listener.close()
            continue
        return listener
    raise ConfigError(f"--port: {port} is in use; allowed: a free port. Leave it out to take one")
