"""Packaging from settings.ini, the file nbdev 2 reads."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = {key[: -len("_requirements")]: value.split() for key, value in cfg.items() if key.endswith("_requirements")}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    packages=[*find_packages(include=["fields", "fields.*"]), "fields.data_manifests"],
    package_dir={"fields.data_manifests": "data_manifests"},
    include_package_data=True,
    package_data={"": ["*.npz", "*.yaml", "*.json"], "fields": ["checkpoints/*", "profiles/*"]},
    python_requires=">=3.11",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
