# SPDX-License-Identifier: Apache-2.0
"""Reads TensorBoard's files of events, one by one, as they were written."""

import struct

from tensorboardX.proto.event_pb2 import Event


def events_in(path):
    """The events of a file. A record is its length, a checksum of it, the event, and a checksum of that."""
    content, at, events = path.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        events.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += length + 16
    return events
