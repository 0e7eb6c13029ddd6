"""Packaging from settings.ini, the file nbdev 2 reads."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = {key[: -len("_requirements")]: value.split() for key, value in cfg.items() if key.endswith("_requirements")}
# the packages of the site contradict the pins of the library: `make docs` gives them an environment of their own
extras["all"] = sorted({requirement for name, group in extras.items() if name != "docs" for requirement in group})
CLASSIFIERS = """
Development Status :: 3 - Alpha
Environment :: Console
Framework :: Jupyter
Intended Audience :: Science/Research
License :: OSI Approved :: Apache Software License
Operating System :: POSIX :: Linux
Programming Language :: Python :: 3
Programming Language :: Python :: 3.11
Programming Language :: Python :: 3.12
Topic :: Multimedia :: Graphics :: 3D Modeling
Topic :: Scientific/Engineering :: Image Recognition
"""

setup(
    name=cfg["distribution"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Paper": "https://arxiv.org/abs/2511.21245"},
    keywords=cfg["keywords"],
    classifiers=CLASSIFIERS.split("\n")[1:-1],
    packages=[*find_packages(include=["fields", "fields.*"]), "fields.data_manifests"],
    package_dir={"fields.data_manifests": "data_manifests"},
    include_package_data=True,
    package_data={"": ["*.npz", "*.yaml", "*.json", "*.css"], "fields": ["checkpoints/*", "profiles/*"]},
    python_requires=f">={cfg['min_python']},<{cfg['max_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
