"""STDiT3 a second time: plain loops in float64 over lists of vectors, from the description alone, for one sample."""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def velocity_towards_data(
    weights: Weights, heads: int, x: np.ndarray, time: float, text: np.ndarray, fps: float, height: float, width: float
) -> np.ndarray:
    """(channels, frames, rows, columns) of the clip x, given the encoded text that counts, (n, text width)."""
    channels, frames, rows, columns = x.shape
    places = [(i, j) for i in range(math.ceil(rows / 2)) for j in range(math.ceil(columns / 2))]
    size = (math.ceil(rows / 2), math.ceil(columns / 2))
    kernel, bias = weights["patch_embedding.weight"], weights["patch_embedding.bias"]
    dim, scale = len(bias), math.sqrt(height * width) / 512
    side = round(math.sqrt(len(places)))

    tokens = []  # [frame][place]
    for frame in range(frames):
        here = []
        for i, j in places:
            token = bias.astype(float).copy()
            for a in range(2):
                for b in range(2):
                    if 2 * i + a < rows and 2 * j + b < columns:
                        token += kernel[:, :, 0, a, b] @ x[:, frame, 2 * i + a, 2 * j + b]
            position = [wave(j * side / size[1] / scale, dim // 2), wave(i * side / size[0] / scale, dim // 2)]
            here.append(token + np.concatenate(position))
        tokens.append(here)

    when = embedded(weights, "time_embedding", time) + embedded(weights, "fps_embedding", fps)
    six = linear(weights, "modulation", silu(when)).reshape(6, dim)
    words = [linear(weights, "text_embedding.fc2", gelu(linear(weights, "text_embedding.fc1", word))) for word in text]
    pairs = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for pair in range(pairs):
        for kind in ("spatial", "temporal"):
            tokens = block(weights, f"blocks.{pair}.{kind}", heads, tokens, words, six)

    made = np.zeros((channels, frames, 2 * size[0], 2 * size[1]))
    for frame in range(frames):
        for token, (i, j) in zip(tokens[frame], places, strict=True):
            shift, scale_by = weights["head.scale_shift_table"] + when
            patch = linear(weights, "head.proj", normed(token) * (1 + scale_by) + shift).reshape(2, 2, 2 * channels)
            for a in range(2):
                for b in range(2):
                    made[:, frame, 2 * i + a, 2 * j + b] = patch[a, b, :channels]
    return made[:, :, :rows, :columns]


def block(weights: Weights, name: str, heads: int, tokens: list, words: list, six: np.ndarray) -> list:
    """One block: its attention is among the places of a frame, or among the frames of a place."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = weights[f"{name}.modulate.table"] + six
    frames, places = len(tokens), len(tokens[0])
    given = [[normed(token) * (1 + scale) + shift for token in frame] for frame in tokens]
    seen = [[None] * places for _ in range(frames)]
    if name.endswith("spatial"):
        for frame in range(frames):
            seen[frame] = self_attention(weights, f"{name}.attn", heads, given[frame], rotated=False)
    else:
        for place in range(places):
            column = self_attention(weights, f"{name}.attn", heads, [frame[place] for frame in given], rotated=True)
            for frame in range(frames):
                seen[frame][place] = column[frame]
    made = []
    for frame in range(frames):
        made.append([])
        for place in range(places):
            token = tokens[frame][place] + gate * seen[frame][place]
            token = token + cross_attention(weights, f"{name}.cross_attn", heads, token, words)
            inner = linear(weights, f"{name}.mlp.fc1", normed(token) * (1 + mlp_scale) + mlp_shift)
            made[-1].append(token + mlp_gate * linear(weights, f"{name}.mlp.fc2", gelu(inner)))
    return made


def self_attention(weights: Weights, name: str, heads: int, tokens: list, rotated: bool) -> list:
    parts = [linear(weights, f"{name}.qkv", token).reshape(3, heads, -1) for token in tokens]
    out = [[] for _ in tokens]
    for head in range(heads):
        queries = [rms(part[0, head]) * weights[f"{name}.q_norm.weight"] for part in parts]
        keys = [rms(part[1, head]) * weights[f"{name}.k_norm.weight"] for part in parts]
        if rotated:
            queries = [turned(query, place) for place, query in enumerate(queries)]
            keys = [turned(key, place) for place, key in enumerate(keys)]
        for index, query in enumerate(queries):
            out[index].append(mixture(query, keys, [part[2, head] for part in parts]))
    return [linear(weights, f"{name}.proj", np.concatenate(values)) for values in out]


def cross_attention(weights: Weights, name: str, heads: int, token: np.ndarray, words: list) -> np.ndarray:
    query = linear(weights, f"{name}.query", token).reshape(heads, -1)
    parts = [linear(weights, f"{name}.key_value", word).reshape(2, heads, -1) for word in words]
    mixed = [mixture(query[h], [part[0, h] for part in parts], [part[1, h] for part in parts]) for h in range(heads)]
    return linear(weights, f"{name}.proj", np.concatenate(mixed))


def mixture(query: np.ndarray, keys: list, values: list) -> np.ndarray:
    shares = [math.exp(float(query @ key) / math.sqrt(len(query))) for key in keys]
    return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)


def turned(vector: np.ndarray, place: int) -> np.ndarray:
    made = vector.copy()
    for k in range(0, len(vector), 2):
        angle = place * 10000 ** (-k / len(vector))
        cosine, sine = math.cos(angle), math.sin(angle)
        made[k] = vector[k] * cosine - vector[k + 1] * sine
        made[k + 1] = vector[k + 1] * cosine + vector[k] * sine
    return made


def wave(place: float, size: int) -> np.ndarray:
    """Sines, then cosines, of a place: size / 2 of each, from fast to slow."""
    angles = [place * 10000 ** (-2 * k / size) for k in range(size // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def embedded(weights: Weights, name: str, value: float) -> np.ndarray:
    """A number's cosines, then sines, through two layers."""
    half = weights[f"{name}.linear_1.weight"].shape[1] // 2
    angles = [value * math.exp(-math.log(10000) * k / half) for k in range(half)]
    waves = np.array([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    return linear(weights, f"{name}.linear_2", silu(linear(weights, f"{name}.linear_1", waves)))


def linear(weights: Weights, name: str, vector: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"]


def normed(vector: np.ndarray) -> np.ndarray:
    return (vector - vector.mean()) / math.sqrt(vector.var() + 1e-6)


def rms(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt((vector**2).mean() + 1e-6)


def silu(vector: np.ndarray) -> np.ndarray:
    return vector / (1 + np.exp(-vector))


def gelu(vector: np.ndarray) -> np.ndarray:
    return vector / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (vector + 0.044715 * vector**3)))
