"""What pyproject.toml cannot say: the wheel holds ``configs/`` and ``examples/``; PyPI's page has links that work."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/lowmem-db/lowmem-db"


class BuildWithExamples(build_py):
    """Copies the configurations and the photos of the demo into the package."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "examples"):
                shutil.copytree(ROOT / folder, Path(self.build_lib, "lowmem_db", folder), dirs_exist_ok=True)


def readme() -> str:
    """Return the README with links that work outside the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", text)


setup(
    cmdclass={"build_py": BuildWithExamples}, long_description=readme(), long_description_content_type="text/markdown"
)
