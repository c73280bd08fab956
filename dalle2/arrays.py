"""Arrays in many files, read as one: the shards of a store."""

import contextlib

import numpy as np


class JoinedArray:
    """Arrays (N_i, ...) one behind the other, read along the first axis like one (sum N_i, ...): by
    a number, a slice without a step or an array of numbers."""

    def __init__(self, parts):
        self.parts, self.start = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return int(self.start[-1])

    @property
    def shape(self):
        return len(self), *self.parts[0].shape[1:]

    @property
    def dtype(self):
        return self.parts[0].dtype

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._read_slice(*index.indices(len(self))[:2])
        part = np.searchsorted(self.start, index, side="right") - 1
        if np.ndim(index) == 0:
            if not 0 <= index < len(self):
                raise IndexError(index)
            return self.parts[part][index - self.start[part]]
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        for i in np.unique(part):
            rows = part == i
            out[rows] = self.parts[i][np.asarray(index)[rows] - self.start[i]]
        return out

    def _read_slice(self, start, stop):
        pieces, part = [], np.searchsorted(self.start[:-1], start, side="right") - 1
        while not pieces or self.start[part] < stop:
            begin = self.start[part]
            pieces.append(self.parts[part][max(0, start - begin):max(0, stop - begin)])
            part += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def join_arrays(parts):
    return parts[0] if len(parts) == 1 else JoinedArray(parts)


def join_starts(parts):
    """Arrays (N_i + 1,) of where each row begins in its own file -> (sum N_i + 1,), in all."""
    ends = np.cumsum([0, *(part[-1] for part in parts)])
    return np.concatenate([*(part[:-1] + end for part, end in zip(parts, ends)), ends[-1:]])


class ByteRows:
    """Rows of bytes in one `stream`, row i from start[i] to start[i + 1]."""

    def __init__(self, stream, start):
        self.stream, self.start = stream, start

    def __len__(self):
        return len(self.start) - 1

    def __getitem__(self, index):
        return self.stream[self.start[index]:self.start[index + 1]].tobytes()


def allow_open_files(count):
    """Raises this process's limit on open files towards `count`, where there is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # Windows has none
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 512 if hard == resource.RLIM_INFINITY else min(count + 512, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
