"""The environment of the tests: what whoever runs them has set must not lead them to his cluster, buckets or proxy.

Imported for its effect, before anything that reads the environment. A test that wants such a variable sets it.
"""

from __future__ import annotations

import os
import signal

for name in list(os.environ):
    if name.upper().startswith(("AWS_", "RAY_", "SMSBATCH_")) or name.upper().endswith("_PROXY"):
        del os.environ[name]
os.environ |= {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",  # else a test without credentials would ask beyond loopback for some
    "NO_PROXY": "127.0.0.1,localhost",  # some systems know proxies from elsewhere
    "no_proxy": "127.0.0.1,localhost",
    "RAY_worker_niceness": "0",  # else actors, which are nice, wait for every other test
    "HF_HUB_OFFLINE": "1",  # a test that reaches for a hub fails at once
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads cost these small models more than they give

# A shell starts what it puts into the background without it, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
