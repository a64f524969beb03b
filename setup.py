"Package metadata, read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser()
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
meta,extras = cfg['DEFAULT'],{k:v.split() for k,v in cfg['extras'].items() if k not in cfg['DEFAULT']}

setup(description=meta['description'], long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    keywords=meta['keywords'].split(), author=meta['author'], author_email=meta['author_email'], license=meta['license'],
    python_requires=f">={meta['min_python']}", classifiers=meta['classifiers'].strip().splitlines(),
    install_requires=meta['requirements'].split(), extras_require=extras)
