"""ClickHouse for one machine: chDB behind an endpoint that speaks ClickHouse's HTTP protocol.

Ordinary clients (clickhouse-connect, sync and async, curl, plain HTTP) work unchanged, so that a
real ClickHouse server is a change of URL. Run it with
``python -m stack.clickhouse_http --host 127.0.0.1 --port 8123 --path DIR``.

- ``statements``  what must be known of an SQL text before the engine sees it (pure)
- ``encodings``   content encodings of requests and responses
- ``failures``    ClickHouse's exceptions and their codes
- ``engine``      the chDB engine and its handles, with settings for one request
- ``sessions``    handles that outlive a request
- ``execution``   one statement on one handle: inserts, streams, summaries
- ``forms``       multipart bodies: form-encoded queries and external tables
- ``endpoint``    the ASGI application
- ``__main__``    the process: arguments, lock, socket, signals

What it does not do: TLS, quotas, users beyond one, ``KILL QUERY`` by the client's query id,
ClickHouse's own block compression (``compress=1``), ``system.*_log`` tables (chDB has none).
Whoever may log in may read files of the machine through table functions, as with
``clickhouse local``: bind it to loopback.
"""
