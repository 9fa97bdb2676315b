"""A run as TensorBoard sees it: one stream of events, whatever happened to the run in between.

TensorBoard reads the event files of a folder in the order of their names. Each start of a run writes a new one, which
begins with what the earlier ones hold up to the step it goes on from, and then empties those. So a step is there once,
whichever of TensorBoard's two readers looks, and whenever. A reader that has followed the run from its beginning drops
what it knows, at the new file's start event or at the first lower step of a curve, and reads it again.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.text import metadata as text_metadata

from gru4recf_dist.data import storage
from gru4recf_dist.growing_file import GrowingFile
from gru4recf_dist.run_description import RunDescription

# Object storage takes a file as a whole each time it grows: another one begins when it is as long as this.
LONGEST_UPLOAD_BYTES = 4 << 20
# HPARAMS has columns for five parameters until others are ticked: without these, the first by the alphabet.
_SHOWN_FIRST = ("batch_size", "loss.negatives", "model.hidden_size", "optimizer.lr", "table.lr")


class TensorBoardLog:
    """The events of a run in ``folder``, over all its restarts.

    Args:
        description: what HPARAMS and TEXT show; it takes the place of what an earlier start wrote.
        keep: by step and names, whether what an interrupted run left stays.
        warn: as `GrowingFile`.
    """

    def __init__(
        self,
        folder: str,
        description: RunDescription,
        keep: Callable[[int, Iterable[str]], bool],
        warn: Callable[[str], None],
    ) -> None:
        self._folder, self._warn = folder, warn
        earlier = {
            storage.join(folder, name): int(number[1])
            for name in storage.list_names(folder)
            if (number := re.search(r"\.tfevents\.(\d+)", name))
        }
        contents = {url: storage.read_bytes(url) for url in earlier}
        kept = [record for content in contents.values() for record in _kept(content, keep)]
        # By the clock, as is usual, but later than any other: clocks differ, and a restart may take less than a second.
        self._number = max([int(time.time()), *(number + 1 for number in earlier.values())])
        described = [_record(Event(summary=summary)) for summary in _described(description)]
        start = _record(Event(session_log=SessionLog(status=SessionLog.START)))
        self._file = self._new_file(b"".join([start, *described, *kept]))
        # Not removed: TensorBoard, if it is just reading one of them, would wait for it forever. Nor quite empty: a
        # process of the earlier start that is still dying may add to it, which a start event before that makes void.
        for url in contents:
            storage.write_bytes(url, _VERSION + start)

    def _new_file(self, content: bytes = b"") -> GrowingFile:
        name = f"events.out.tfevents.{self._number:010d}.rank0"
        return GrowingFile(storage.join(self._folder, name), _VERSION + content, self._warn)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._file.append(_record(Event(step=step, summary=Summary(value=points))))
        if not self._file.is_local and len(self._file) > LONGEST_UPLOAD_BYTES and self._file.flush():
            self._file.close()
            self._number += 1
            self._file = self._new_file()

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Add what the run is judged by, tell HPARAMS that it has come to its end, and close."""
        self.append(step, metrics)
        end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        self._file.append(_record(Event(summary=_hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end))))
        self.close()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _described(description: RunDescription) -> Iterator[Summary]:
    """The experiment's columns, this run's values, and its texts."""
    types = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name, type=types.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=name in _SHOWN_FIRST
            )
            for name, value in description.hyper_parameters.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=shown)
            for tag, shown in description.final_metrics.items()
        ],
    )
    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in description.hyper_parameters.items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], kind, value)
    yield _hparams(metadata.EXPERIMENT_TAG, experiment=experiment)
    yield _hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start)
    for tag, text in description.texts.items():
        shown_as = text_metadata.create_summary_metadata(display_name="", description="")
        # Of no dimension: one of a list would be shown as a table.
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto())
        yield Summary(value=[Summary.Value(tag=tag, metadata=shown_as, tensor=tensor)])


def _hparams(tag: str, **content) -> Summary:
    shown_as = metadata.create_summary_metadata(HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=shown_as, tensor=metadata.NULL_TENSOR)])


def _record(event: Event) -> bytes:
    """An event, of now, as it lies in a file: length, its checksum, content, its checksum."""
    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return b"".join([length, next(checksums), content, next(checksums)])


def _kept(content: bytes, keep: Callable[[int, Iterable[str]], bool]) -> Iterator[bytes]:
    """The records of scalars to keep, up to the first that is damaged: a killed process may leave half of one."""
    place = 0
    while place + 16 <= len(content):
        length, checksum = struct.unpack_from("<QI", content, place)
        end = place + 16 + length
        if checksum != masked_crc32c(content[place : place + 8]) or end > len(content):
            return
        try:
            # The content's own checksum takes Python a second for ten MB; zeros in it do not parse.
            event = Event.FromString(content[place + 12 : end - 4])
        except DecodeError:
            return
        values = event.summary.value
        if any(value.HasField("simple_value") for value in values) and keep(
            event.step, [value.tag for value in values]
        ):
            yield content[place:end]
        place = end


# What every event file begins with.
_VERSION = _record(Event(file_version="brain.Event:2"))
