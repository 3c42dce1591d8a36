"""The HARP proxy with silbo's dispatcher in place of its own: `python -m examples.harp_plugin FILE`."""

import sys

from harp import run
from harp._logging import configure_logging
from harp.config import ConfigurationBuilder
from harp.config.builders.system import System, SystemBuilder

from silbo import AsyncEventDispatcher


class Configuration(ConfigurationBuilder):
    """HARP's configuration, whose system has silbo's dispatcher and serves this machine alone."""

    async def abuild_system(self, *, validate_dependencies: bool = True) -> System:
        builder = SystemBuilder(self.applications, self.build, hostname="127.0.0.1")
        builder.AsyncEventDispatcherType = AsyncEventDispatcher  # the place where it is replaced
        system = await builder.abuild(validate_dependencies=validate_dependencies)
        for row in system.dispatcher.describe():
            print(f"{row.name}: {row.listener.__qualname__} of {row.plugin}, priority {row.priority}", flush=True)
        return system


def main(*files: str) -> None:
    configure_logging()
    configuration = Configuration(use_default_applications=False)
    configuration.add_files(files)
    run(configuration)


if __name__ == "__main__":
    main(*sys.argv[1:])
