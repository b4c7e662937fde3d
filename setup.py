"""Metadata is in pyproject.toml. This finds the packages and adds the two files that Python reads at start-up."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

STARTUP = {
    # Python before 3.15. One line, as the format wants; nothing that is wrong with us may trouble an interpreter.
    "qualiclip_pyiqa.pth": (
        'import sys; exec("try:\\n import qualiclip_pyiqa_start as q\\n q.start()\\nexcept Exception: pass")\n'
    ),
    # Python 3.15 (PEP 829), which then ignores the `import` line of the .pth file of the same name.
    "qualiclip_pyiqa.start": "qualiclip_pyiqa_start:start\n",
}


class BuildWithStartup(build_py):
    def run(self):
        # pip builds in the checkout and empties nothing: a module that was moved would be shipped in both places.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        # An editable wheel takes its files from where `install` would put them, not from build_lib.
        install = self.distribution.get_command_obj("install")
        self.startup_folder = Path(install.install_purelib if self.editable_mode else self.build_lib)
        for name, text in STARTUP.items():
            self.startup_folder.joinpath(name).write_text(text, encoding="ascii")

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [str(Path(self.build_lib, name)) for name in STARTUP]


setup(
    # The weights stand at the top of the checkout and inside the package of an installation.
    packages=[*find_packages(include=["qualiclip_pyiqa", "qualiclip_pyiqa.*"]), "qualiclip_pyiqa._weights"],
    package_dir={"qualiclip_pyiqa._weights": "weights"},
    cmdclass={"build_py": BuildWithStartup},
)
