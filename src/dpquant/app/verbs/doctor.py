# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant doctor`. Loads no torch before it runs."""

from dpquant.app.options import Json


def doctor(as_json: Json = False) -> None:
    """Tell what dpquant finds on this machine, as a block to paste into a bug report. Loads no data.

    Versions, native module and instruction sets, the backend that auto takes and why, threads, memory, disk, cache,
    GPUs, and which optional parts are there. The block names no host and no user.

    With --json: network, versions (an object), system, processor, instructions, cores, threads, native,
    native_obstacle, devices, backend, backend_reason, memory_gib and memory_free_gib (null: not known), disk_free_gib,
    cache, cache_mib, extras (an object of true and false) and advice (a list of texts).

    Example: dpquant doctor
    """
    from dpquant.app.doctor import Health

    health = Health.here()
    if as_json:
        print(health.to_json(), end="")
        return
    width = max(len(name) for name, _ in health.rows)
    print("```")
    for name, value in health.rows:
        print(f"{name:{width}}  {value}")
    print("```")
    for advice in health.advice:
        print(advice)
