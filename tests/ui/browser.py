"""A server of the page whose demo run takes seconds, in a process of its own.

python -m tests.ui.browser RUNS CONFIGS [PORT]
"""

import subprocess
import sys
from pathlib import Path
from typing import IO

from lowmem_db.config import shipped
from lowmem_db.ui.server import serve


class Server:
    """The page in a process of its own.

    Args:
        runs: The folder of runs.
        configs: The configurations to start from.
        environment: Environment variables.
        port: The port. Default: any.
    """

    def __init__(self, runs: Path, configs: Path, environment: dict[str, str], port: int = 0) -> None:
        command = [sys.executable, "-m", "tests.ui.browser", str(runs), str(configs), str(port)]
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        out: IO[str] | None = self._process.stderr
        assert out is not None
        said = out.readline()
        assert "http://" in said, said + out.read()
        self.address = said[said.index("http://") :].strip()
        self.port = int(self.address.split(":")[2].split("/")[0])

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


if __name__ == "__main__":
    shipped.CONFIGS = Path(sys.argv[2])
    serve(Path(sys.argv[1]), port=int(sys.argv[3]) or None, behind_proxy=False, open_browser=False)
