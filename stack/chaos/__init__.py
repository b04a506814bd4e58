"""`fanfare chaos`: kill and stop everything during campaigns, and count what that cost.

``schedule`` draws the faults from a seed, ``nemesis`` carries them out on the real processes,
``traffic`` keeps promotional campaigns and critical messages flowing, ``records`` reads what the
provider, Kafka with the ledger, and ClickHouse say, ``checker`` compares that with the audience,
``report`` and ``contract`` tell it.
"""
