"""A call and its arguments, to be made again in other processes: the bytes, and the tensors beside
them, so that a node holds the weights once however many processes it has.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidValue

MISTAKE = 3
"""The exit code of a worker that has left a sentence for the user."""


class Call:
    """A function with its arguments, packed.

    Args:
        function: of a module, so that other processes find it.
        arguments: by name.

    Attributes:
        packed: all but the tensors.
        tensors: of the arguments and their modules, on the host.

    Raises:
        InvalidValue: for an argument that can't be sent.
    """

    def __init__(self, function: Any, arguments: dict[str, Any]) -> None:
        for name, value in ({"the function": function} | arguments).items():
            try:
                _packed(value)
            except Exception as error:  # pickle raises many kinds
                reason = str(error).partition("\n")[0]
                raise InvalidValue(
                    f"{name} can't be sent to other processes ({reason:.200}); expected what "
                    "pickle can write: functions of a module and no lambdas, or engine='local' "
                    "without workers."
                ) from None
        self.packed, self.tensors = _packed((function, arguments))

    @staticmethod
    def made(packed: bytes, tensors: Sequence[Tensor], device: str | None) -> Any:
        """The function and its arguments again, modules on a device.

        Args:
            packed: of a call.
            tensors: of the same.
            device: where modules go; None leaves them on the host.
        """
        function, arguments = _Unpickler(io.BytesIO(packed), tensors).load()
        if device is not None:
            for value in arguments.values():
                for part in (
                    value,
                    getattr(value, "transformer", None),
                    getattr(value, "vae", None),
                ):
                    if isinstance(part, nn.Module):
                        nn.Module.to(part, device)
        return function, arguments


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}
        self.alive: list[Any] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, (types.FunctionType, type)) and value.__module__ == "__main__":
            raise pickle.PicklingError(f"{value.__qualname__} is defined in the program itself")
        if type(value) not in (Tensor, nn.Parameter):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.tensors)
            self.tensors.append(value.detach().to("cpu"))
            self.alive.append(value)
        kind = "parameter" if type(value) is nn.Parameter else "tensor"
        return kind, self.places[id(value)], value.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors, self.made = tensors, dict[int, Any]()

    def persistent_load(self, pid: Any) -> Any:
        kind, place, needs_grad = pid
        if place not in self.made:
            held = self.tensors[place]
            self.made[place] = (
                nn.Parameter(held, requires_grad=needs_grad)
                if kind == "parameter"
                else held.requires_grad_(needs_grad)
            )
        return self.made[place]


def _packed(value: Any) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    with torch.no_grad():
        pickler.dump(value)
    return file.getvalue(), pickler.tensors
