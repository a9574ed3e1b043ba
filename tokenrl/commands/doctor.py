"""`tokenrl doctor`."""


def doctor() -> None:
    """Versions, and each backend: whether it can run here, or why not.

    Example: tokenrl doctor
    """
    from rich.console import Console

    from ..instruments.doctor import print_doctor

    print_doctor(Console())
