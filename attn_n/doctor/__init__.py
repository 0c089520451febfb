"""The command `python -m attn_n`: a report on versions, devices and backends, a self-check and a timing table."""
