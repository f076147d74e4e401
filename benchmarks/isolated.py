"""A function call in a fresh process, so that threads, memory and imports of one measurement do not touch another's."""

import gc
import os
import traceback
from multiprocessing import get_context, util


def isolated(function, *arguments, **more):
    """What the function returns. Raises RuntimeError, with the traceback, for whatever is raised in it."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_call, args=(theirs, function, arguments, more))
    process.start()
    theirs.close()
    try:
        result, error = ours.recv()
    except EOFError:
        result, error = None, f"the process of {function.__name__} ended without an answer"
    process.join()
    if error:
        raise RuntimeError(error)
    return result


def _call(connection, function, arguments, more):
    try:
        connection.send((function(*arguments, **more), None))
    except Exception:
        connection.send((None, traceback.format_exc()))
    leave()


def leave():
    """End a process of multiprocessing without the exit at which some libraries print what they left in memory."""
    gc.collect()  # data loaders end their workers
    util._exit_function()
    os._exit(0)
