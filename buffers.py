"""One replay buffer for both levels: fields of fixed shape, overwritten in a circle."""

import math

import torch


class ReplayBuffer:
    """The last `capacity` transitions, sampled uniformly with replacement.

    fields   name -> shape of one row, e.g. {"state": (30,), "reward": ()}; all stored as float32
    device   where the rows live; samples are returned there
    """

    def __init__(self, capacity, fields, device="cpu", generator=None):
        self.capacity = capacity
        self.fields = dict(fields)
        self.generator = generator
        # All fields side by side in one matrix, so that a sample is a single gather.
        ends = [0]
        for shape in self.fields.values():
            ends.append(ends[-1] + math.prod(shape))
        names = zip(self.fields, ends, ends[1:], strict=False)
        self.columns = {name: slice(start, end) for name, start, end in names}
        self.storage = torch.empty(capacity, ends[-1], device=device)
        self.added = 0  # rows ever written; the next goes to added % capacity

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, **rows):
        """Append n rows: each field [n, *shape]; n is at most the capacity."""
        if rows.keys() != self.fields.keys():
            raise KeyError(f"rows have {sorted(rows)}, the buffer has {sorted(self.fields)}")
        like = dict(dtype=torch.float32, device=self.storage.device)
        parts = [torch.as_tensor(rows[name], **like) for name in self.fields]
        n = len(parts[0])
        flat = torch.cat([part.reshape(n, -1) for part in parts], 1)
        first = self.added % self.capacity
        fitting = min(n, self.capacity - first)
        self.storage[first : first + fitting] = flat[:fitting]
        self.storage[: n - fitting] = flat[fitting:]
        self.added += n

    def sample(self, batch_size):
        """A dict of tensors [batch_size, *shape], rows drawn uniformly from those written."""
        if self.added == 0:
            raise ValueError("cannot sample from an empty replay buffer")
        device = self.storage.device
        index = torch.randint(len(self), (batch_size,), generator=self.generator, device=device)
        return self._split(self.storage[index])

    def rows(self):
        """All rows written, in the order of their slots, as a dict like a sample's."""
        return self._split(self.storage[: len(self)])

    def _split(self, flat):
        return {
            name: flat[:, self.columns[name]].reshape(len(flat), *shape)
            for name, shape in self.fields.items()
        }

    def state_dict(self):
        """Only what has been written, so that a young buffer makes a small file."""
        return {"storage": self.storage[: len(self)].clone(), "added": self.added}

    def load_state_dict(self, state):
        """Raises ValueError if the rows do not fit this buffer's fields or capacity."""
        storage, added = state["storage"], state["added"]
        if storage.shape != (min(added, self.capacity), self.storage.shape[1]):
            raise ValueError(
                f"saved rows of shape {tuple(storage.shape)} do not fit a buffer of "
                f"{self.capacity} rows of {self.storage.shape[1]} numbers"
            )
        self.storage[: len(storage)] = storage
        self.added = added
