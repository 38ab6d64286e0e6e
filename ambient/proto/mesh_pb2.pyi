from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class AwaitAcknowledgedRequest(_message.Message):
    __slots__ = ("workload_uid", "hbone", "timeout_ms")
    WORKLOAD_UID_FIELD_NUMBER: _ClassVar[int]
    HBONE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    workload_uid: str
    hbone: bool
    timeout_ms: int
    def __init__(self, workload_uid: _Optional[str] = ..., hbone: _Optional[bool] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class AwaitAcknowledgedResponse(_message.Message):
    __slots__ = ("acknowledged", "waiting_for")
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    acknowledged: bool
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, acknowledged: _Optional[bool] = ..., waiting_for: _Optional[_Iterable[str]] = ...) -> None: ...
