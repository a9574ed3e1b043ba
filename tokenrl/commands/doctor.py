"""`tokenrl doctor`."""


def doctor() -> None:
    """Versions, each backend: whether it can run here, or why not, and the trainers that are installed.

    Example: tokenrl doctor
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..instruments.doctor import print_doctor
    from ..integrations import hosts

    console = Console()
    print_doctor(console)
    table = Table("trainer", "here", "held to", "for", "", box=box.SIMPLE_HEAD)
    for name, host in hosts.HOSTS.items():
        if found := hosts.version_of(host.distribution):
            table.add_row(
                host.distribution, found, f"{host.oldest} to {host.newest}", host.what, escape(hosts.standing(name))
            )
    if table.row_count:
        console.print(table, highlight=False)
