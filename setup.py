"Packaging only: everything it says is read from settings.ini."
from configparser import ConfigParser
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
setup(name=cfg["lib_name"], version=cfg["version"], packages=find_packages(include=["ctdiffusion*"]))
