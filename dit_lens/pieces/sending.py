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

from ..errors import InvalidState, InvalidValue
from .content import outline

MISTAKE = 3
"""The exit code of a worker that has left a sentence for the user."""


class Call:
    """A function with its arguments, packed.

    Args:
        function: of a module, so that other processes find it.
        arguments: by name.
        instead: of what is not sent, with what stands in its place.

    Attributes:
        packed: all but the tensors.
        tensors: of the arguments and their modules, on the host.

    Raises:
        InvalidValue: for an argument that can't be sent.
    """

    def __init__(
        self, function: Any, arguments: dict[str, Any], instead: Sequence[tuple[Any, Any]] = ()
    ) -> None:
        for name, value in ({"the function": function} | arguments).items():
            try:
                _packed(value, instead)
            except Exception as error:  # pickle raises many kinds
                reason = str(error).partition("\n")[0]
                raise InvalidValue(
                    f"{name} can't be sent to other processes ({reason:.200}); expected what "
                    "pickle can write: functions of a module and no lambdas, or engine='local' "
                    "without workers."
                ) from None
        packed, self.tensors = _packed((function, arguments), instead)
        _, arrived = _unpacked(packed, self.tensors)
        told = {name: outline(value) for name, value in arrived.items()}
        self.packed = pickle.dumps((packed, told))

    @staticmethod
    def made(packed: bytes, tensors: Sequence[Tensor], device: str | None) -> Any:
        """The function and its arguments again, modules on a device.

        Args:
            packed: of a call.
            tensors: of the same.
            device: where modules go; None leaves them on the host.

        Raises:
            InvalidState: for an argument that is another one here: functions and classes are sent
                by their names, and here they are as their modules have them.
        """
        call, told = pickle.loads(packed)
        function, arguments = _unpacked(call, tensors)
        for name, value in arguments.items():
            if outline(value) != told[name]:
                raise InvalidState(
                    f"{name} is another one in other processes: something that its functions or "
                    "classes hold or read was changed after their module was imported; expected "
                    "them as the module has them, or engine='local' without workers."
                )
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
    def __init__(self, file: io.BytesIO, instead: Sequence[tuple[Any, Any]]) -> None:
        super().__init__(file, protocol=5)
        self.instead = {id(each): other for each, other in instead}
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}
        self.alive: list[Any] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, (types.FunctionType, type)) and value.__module__ == "__main__":
            raise pickle.PicklingError(f"{value.__qualname__} is defined in the program itself")
        if id(value) in self.instead:
            return "instead", self.instead[id(value)], False
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
        if kind == "instead":
            return place
        if place not in self.made:
            held = self.tensors[place]
            self.made[place] = (
                nn.Parameter(held, requires_grad=needs_grad)
                if kind == "parameter"
                else held.requires_grad_(needs_grad)
            )
        return self.made[place]


def _unpacked(packed: bytes, tensors: Sequence[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(packed), tensors).load()


def _packed(value: Any, instead: Sequence[tuple[Any, Any]]) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file, instead)
    with torch.no_grad():
        pickler.dump(value)
    return file.getvalue(), pickler.tensors
