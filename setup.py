"Packaging only: everything it says is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=licenses[cfg["license"]],
    license_files=["LICENSE"],
    url=cfg["git_url"],
    project_urls={"Source": cfg["git_url"], "Issues": cfg["git_url"] + "/issues", "Paper": cfg["paper_url"]},
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        *(f"Intended Audience :: {audience}" for audience in cfg["audience"].split(", ")),
        f"Natural Language :: {cfg['language']}",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in cfg["tested_python"].split()),
        *(f"Topic :: {topic}" for topic in cfg["topics"].split(", ")),
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    packages=find_packages(include=["ctdiffusion*"]),
    package_data={"ctdiffusion": cfg["package_data"].split()},
    include_package_data=False,
    zip_safe=False,
)
