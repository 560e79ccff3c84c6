"""Small vision-language models with random weights, pictures of noise, rows about them, and a judge: transformers.

The tokenizer has a token for every byte and the special tokens of Qwen2-VL; the chat template writes pictures as
Qwen2-VL's does. Patches are 4 pixels wide, so that a small picture has a few tokens. `reference_loss` shares no code
with what it judges: it uses transformers' processor and positions, one sample at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
VOCAB = 256 + len(SPECIAL)
IDS = {name: 256 + number for number, name in enumerate(SPECIAL)}
IMAGE = IDS["<|image_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 256, "eos_token_id": 258,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
SIZES = ((24, 24), (40, 16), (17, 31), (8, 64))
"""Width and height of pictures: square, wide, odd, tall."""
Row = dict[str, Any]


def make_model(directory: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model as transformers writes it, with its tokenizer and its image processor."""
    directory.mkdir(parents=True)
    config = Qwen2VLConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=IMAGE, video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"], vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    model.save_pretrained(directory)
    Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def as_on_the_hub(model: Path, directory: Path) -> Path:
    """Write the same model with the flat config.json that the hub's checkpoints have."""
    directory.mkdir(parents=True)
    for path in model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (directory / "config.json").write_text(json.dumps(flat))
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    made.chat_template = TEMPLATE
    assert [made.convert_tokens_to_ids(name) for name in SPECIAL] == list(IDS.values())
    return made


def make_pictures(directory: Path, count: int = 4) -> list[str]:
    """Write pictures of noise; return their names."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(5)
    names = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        names.append(f"{number}.png")
    return names


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*turns: str | list[dict[str, Any]]) -> Row:
    """Return a row of OpenAI-style messages: question, answer, question ..."""
    return {
        "messages": [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    }


def picture_talk(name: str, question: str, answer: str) -> Row:
    return talk([{"type": "image", "image": name}, {"type": "text", "text": question}], answer)


def make_data(directory: Path) -> Path:
    """Write rows of all sorts: one picture, two, a picture in the second turn, none."""
    a, b, c, d = make_pictures(directory)
    two = [{"type": "image", "image": c}, {"type": "text", "text": "and"}, {"type": "image", "image": d}]
    later = [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {"url": b}}]
    rows = [
        picture_talk(a, "What is it?", "Noise."),
        talk(two, "Both are noise, and the second is tall."),
        talk("Hello.", "Hello!", later, "Noise again."),
        talk("What is 1 + 1?", "It is 2."),
    ]
    return write_rows(directory / "rows.jsonl", rows)


def reference_loss(model: Path | Any, data: Path) -> float:
    """Return the mean loss over all tokens of answers, as transformers computes it."""
    network = model
    if isinstance(model, Path):
        network = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    network.eval()
    total, count = 0.0, 0
    for line in data.read_text(encoding="utf-8").splitlines():
        inputs, labels = _inputs(json.loads(line)["messages"], data.parent)
        with torch.no_grad():
            logits = network(**inputs).logits[0, :-1]
        chosen = labels[1:] >= 0
        losses = torch.nn.functional.cross_entropy(logits[chosen], labels[1:][chosen], reduction="sum")
        total, count = total + float(losses), count + int(chosen.sum())
    return total / count


def _inputs(messages: list[dict[str, Any]], folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what the model is called with for a conversation, and its labels."""
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    words, pictures = tokenizer(), []
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = words(f"<|im_start|>{message['role']}\n")["input_ids"]
        body: list[int] = []
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                body += words(part["text"])["input_ids"]
                continue
            name = part["image"] if part["type"] == "image" else part["image_url"]["url"]
            pictures.append(processor(images=[Image.open(folder / name)], return_tensors="pt"))
            num_places = int(pictures[-1]["image_grid_thw"].prod()) // 4
            body += [IDS["<|vision_start|>"], *[IMAGE] * num_places, IDS["<|vision_end|>"]]
        body.append(IDS["<|im_end|>"])
        learned = message["role"] == "assistant"
        ids += [*head, *body, *words("\n")["input_ids"]]
        labels += [-1] * len(head) + (body if learned else [-1] * len(body)) + [-1]
    ids_BT = torch.tensor([ids])
    inputs = {"input_ids": ids_BT}
    if pictures:
        inputs |= {name: torch.cat([one[name] for one in pictures]) for name in ("pixel_values", "image_grid_thw")}
        inputs["mm_token_type_ids"] = (ids_BT == IMAGE).int()
    return inputs, torch.tensor(labels)


def tower_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the vision tower in a model's files."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
