"""What a dead or a late rank is to the others: an error that names it."""


class PeerError(RuntimeError):
    """A collective failed, because of other ranks."""


def failed(what: str, error: Exception) -> Exception:
    """The error to raise where a collective failed."""
    return PeerError(f"{what} failed: {error}")
