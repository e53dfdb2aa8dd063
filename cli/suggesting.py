"""A group of commands that suggests similar names for an unknown command; click does the same for options."""

from difflib import get_close_matches

import click


class Suggesting(click.Group):
    """A group whose error for an unknown command suggests commands with similar names."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolves a command.

        Raises:
            click.UsageError: If there is no such command.
        """
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            near = get_close_matches(args[0], known, n=2, cutoff=0.6)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{meant}", ctx)
        return super().resolve_command(ctx, args)
