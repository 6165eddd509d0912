"""Papermill's engine with a client that hears every answer of the kernel, those to cells with widgets included."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from nbclient.util import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.log import logger

ENGINE = "equilab"
KNOCK_SECONDS = 5


class Client(PapermillNotebookClient):
    """Asks the kernel for a sign of life every few seconds while a cell is executed.

    nbclient answers widgets on the socket on which it waits for the end of the cell, and can thereby miss that end and wait
    for ever (jupyter/nbclient, issue 312). Whatever arrives next wakes it; what it did not ask for itself it passes over.
    """

    async def async_execute_cell(self, *arguments: Any, **options: Any) -> Any:
        knocking = asyncio.ensure_future(self._knock())
        try:
            return await super().async_execute_cell(*arguments, **options)
        finally:
            knocking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await knocking

    execute_cell = run_sync(async_execute_cell)

    async def _knock(self) -> None:
        while True:
            await asyncio.sleep(KNOCK_SECONDS)
            self.kc.kernel_info()


class Engine(NBClientEngine):
    """Papermill's own engine, with that client and those of its options that the stage gives."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        start_timeout: int,
        execution_timeout: int,
        extra_arguments: list[str],
        **_: Any,
    ) -> Any:
        client = Client(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=start_timeout,
            timeout=execution_timeout,
            extra_arguments=extra_arguments,
            log=logger,
        )
        return client.execute()


papermill_engines.register(ENGINE, Engine)
