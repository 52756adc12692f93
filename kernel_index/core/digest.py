"""The digest of a receipt: it finds one that was changed by accident or by hand.

It is not a signature: everyone who runs this code can compute it.  A correct digest therefore proves nothing.
"""

import hashlib
import json
from typing import Any


def digest(receipt: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but the digest itself."""
    content = {k: v for k, v in receipt.items() if k != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_problems(receipt: dict[str, Any]) -> list[str]:
    """That the digest does not fit, or cannot be computed; empty where it fits."""
    try:
        return [] if receipt.get("digest") == digest(receipt) else ["digest does not fit the content"]
    except (ValueError, RecursionError) as error:
        return [f"malformed: {error}"]
