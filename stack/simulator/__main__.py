"""``python -m stack.simulator``: start the provider simulator and run it until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

import orjson
import uvloop

from schemas.errors import FanfareError
from stack.simulator import control
from stack.simulator.config import ConfigError, SimulatorConfig, updated
from stack.simulator.control import ControlConnection
from stack.simulator.provider import Simulator
from stack.simulator.sendgrid import SendGridConnection
from stack.simulator.smtp import SmtpConnection
from stack.simulator.webhooks import load_key


def _parser() -> argparse.ArgumentParser:
    control_doc = (control.__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        prog="python -m stack.simulator",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Simulate e-mail providers: SendGrid's v3 API and its signed event webhook,"
        " and SMTP.\nPrints one JSON line with its ports when it is ready; port 0 picks a free"
        " one.",
        epilog="control server:\n\n" + control_doc + "\nexamples:\n"
        "  --set sendgrid.faults.ambiguous_rate=0.01 --set 'sendgrid.latency="
        '{"kind": "fixed", "ms": 50}\'\n'
        "  curl -X PUT localhost:PORT/config -d"
        ' \'{"sendgrid": {"rate_limit": {"per_second": 100}}}\'\n'
        "  curl localhost:PORT/config     # shows every setting with its value",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--http-port", type=int, default=0, metavar="P", help="SendGrid's API")
    add("--smtp-port", type=int, default=0, metavar="P", help="SMTP")
    add("--control-port", type=int, default=0, metavar="P", help="control server")
    add("--record-dir", type=Path, required=True, metavar="DIR", help="where messages are kept")
    add("--sendgrid-key-file", type=Path, metavar="F",
        help="accepted API keys, one a line (default: any key)")  # fmt: skip
    add("--smtp-auth-file", type=Path, metavar="F",
        help="user:password lines; SMTP then demands AUTH")  # fmt: skip
    add("--webhook-url", metavar="URL", help="where events are posted (default: nowhere)")
    add("--webhook-key-file", type=Path, metavar="F",
        help="PEM EC P-256 private key, made if absent; the public one is written to F.pub"
        " (default: webhook-key.pem in the record folder)")  # fmt: skip
    add("--allow-remote", action="store_true", help="permit a webhook URL on another machine")
    add("--tls-cert", type=Path, metavar="F", help="PEM certificate: SMTP offers STARTTLS")
    add("--tls-key", type=Path, metavar="F", help="PEM key of the certificate")
    add("--https", action="store_true", help="speak TLS on the HTTP port, with the certificate")
    add("--seed", type=int, metavar="N", help="seed of faults and fates")
    add("--config", type=Path, metavar="F", help="JSON file of settings, as GET /config shows")
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="one setting by its dotted name; the value is JSON, or else text")  # fmt: skip
    return parser


def _settings(options: argparse.Namespace) -> SimulatorConfig:
    config = SimulatorConfig()
    if options.config is not None:
        try:
            config = updated(config, orjson.loads(options.config.read_bytes()))
        except orjson.JSONDecodeError as error:
            raise ConfigError([(str(options.config), f"not JSON: {error}")]) from error
    for setting in options.settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError([(setting, "expected NAME=VALUE")])
        try:
            value: Any = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        config = updated(config, value)
    if options.seed is not None:
        config = updated(config, {"seed": options.seed})
    if options.webhook_url is not None:
        config = updated(config, {"webhooks": {"url": options.webhook_url}})
    return config


def _lines(path: Path | None) -> list[str]:
    return [] if path is None else [line for line in path.read_text().split("\n") if line.strip()]


def _simulator(options: argparse.Namespace) -> Simulator:
    tls = None
    if options.tls_cert is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(options.tls_cert, options.tls_key)
    if options.https and tls is None:
        raise ConfigError([("--https", "needs --tls-cert and --tls-key")])
    users = {}
    for number, line in enumerate(_lines(options.smtp_auth_file), 1):
        user, colon, password = line.partition(":")
        if not colon:
            raise ConfigError([(f"{options.smtp_auth_file}:{number}", "expected user:password")])
        users[user] = password
    keys = frozenset(line.strip() for line in _lines(options.sendgrid_key_file))
    if options.sendgrid_key_file is not None and not keys:
        raise ConfigError([(str(options.sendgrid_key_file), "the file holds no key")])
    options.record_dir.mkdir(parents=True, exist_ok=True)
    return Simulator(
        _settings(options),
        options.record_dir,
        load_key(options.webhook_key_file or options.record_dir / "webhook-key.pem"),
        sendgrid_keys=keys,
        smtp_users=users,
        tls=tls,
        allow_remote=options.allow_remote,
    )


async def serve(simulator: Simulator, options: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit status."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    simulator.on_failure = stop.set
    host = options.host
    servers = [
        await loop.create_server(
            lambda: SendGridConnection(simulator),
            host,
            options.http_port,
            backlog=4096,
            ssl=simulator.tls if options.https else None,
        ),
        await loop.create_server(
            lambda: SmtpConnection(simulator), host, options.smtp_port, backlog=4096
        ),
        await loop.create_server(lambda: ControlConnection(simulator), host, options.control_port),
    ]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    simulator.webhooks.restore()
    names = ("http_port", "smtp_port", "control_port")
    print(
        json.dumps({"ready": True, "host": host, **dict(zip(names, ports, strict=True))}),
        flush=True,
    )
    await stop.wait()
    for server in servers:
        server.close()
    pending = await simulator.close()
    if pending:
        print(f"{pending} events not yet sent are kept for the next start", file=sys.stderr)
    return 0 if simulator.failure is None else 1


def main() -> int:
    """Parse the arguments and serve. Returns the exit status."""
    options = _parser().parse_args()
    try:
        simulator = _simulator(options)
    except (FanfareError, OSError, ValueError) as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 2
    try:
        return uvloop.run(serve(simulator, options))
    except OSError as error:
        print(f"simulator: cannot listen on {options.host}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
