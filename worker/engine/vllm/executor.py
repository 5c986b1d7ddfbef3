"""Shell. vLLM's multiprocess executor for tensor parallel workers, with one correction.

vLLM 0.32 stops reading replies at the first rank that failed, and leaves the replies of the other
ranks queued. Every later call then gets the answer of an earlier one. After about ten failed
adapter loads generation hangs for ever. Here every rank's reply is read before anything is raised.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.multiproc_executor import FutureWrapper, MultiprocExecutor, WorkerProc


class SafeMultiprocExecutor(MultiprocExecutor):  # type: ignore[misc]
    """Differs from vLLM's only in calls by name, which adapter loads and removals are. Steps are
    left to vLLM.
    """

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
        **how: Any,
    ) -> Any:
        if (
            any(how.values())
            or how.get("unique_reply_rank") is not None
            or timeout is not None
            or not isinstance(method, str)
        ):
            return super().collective_rpc(method, timeout=timeout, args=args, kwargs=kwargs, **how)
        if self.is_failed:
            raise RuntimeError("Executor failed.")
        self.rpc_broadcast_mq.enqueue((method, args, kwargs or {}, None))

        def replies() -> list[Any]:
            got = [queue.dequeue() for queue in self.response_mqs]
            failed = [
                (rank, value)
                for rank, (status, value) in enumerate(got)
                if status != WorkerProc.ResponseStatus.SUCCESS
            ]
            if failed:
                raise RuntimeError(
                    f"Worker failed with error '{failed[0][1]}' on ranks "
                    f"{[rank for rank, _ in failed]} of {len(got)}"
                )
            return [value for _, value in got]

        return FutureWrapper(
            self.futures_queue, get_response=replies, aggregate=lambda values: values
        ).result()
