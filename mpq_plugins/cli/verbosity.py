"""--verbose and --quiet: of every command, and of `mpq` before the command."""

import logging

import click

from ..report.progress import logged, quiet

VERBOSE_KEY, QUIET_KEY = "mpq_plugins.verbose", "mpq_plugins.quiet"


def verbosity_options() -> list[click.Option]:
    """The two options; a command's function does not get them."""
    return [
        click.Option(
            ["-v", "--verbose"], count=True, is_eager=True, expose_value=False, callback=_louder,
            help="Say more: parameters, what was found, what is done. -vv: layer by layer.",
        ),
        click.Option(
            ["-q", "--quiet"], is_flag=True, is_eager=True, expose_value=False, callback=_quieter,
            help="No notes and no progress; warnings and errors stay.",
        ),
    ]  # fmt: skip


def verbose() -> bool:
    """Whether the command that runs was asked to say more."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(VERBOSE_KEY))


def _louder(context: click.Context, _: click.Parameter, count: int) -> None:
    context.meta[VERBOSE_KEY] = context.meta.get(VERBOSE_KEY, 0) + count
    _check(context)
    if count:
        context.with_resource(logged(logging.DEBUG if context.meta[VERBOSE_KEY] > 1 else logging.INFO))


def _quieter(context: click.Context, _: click.Parameter, asked: bool) -> None:
    context.meta[QUIET_KEY] = context.meta.get(QUIET_KEY, False) or asked
    _check(context)
    if asked:
        context.with_resource(quiet())


def _check(context: click.Context) -> None:
    if context.meta.get(VERBOSE_KEY) and context.meta.get(QUIET_KEY):
        raise click.UsageError("--verbose and --quiet ask for opposites; give one")
