"""Names of cases that are the same in every process: workers must agree on them."""

import re


def named(value: object) -> str:
    """What `str` says, without the addresses of functions.

    >>> named({"schedule": len, "stop": lambda: None})
    "{'schedule': <built-in function len>, 'stop': <function <lambda>>}"
    """
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
