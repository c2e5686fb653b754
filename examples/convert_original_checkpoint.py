#!/usr/bin/env python
"""Converts a checkpoint of the original TransVG to a folder that `EpmVGForVisualGrounding.from_pretrained` loads.

python examples/convert_original_checkpoint.py --checkpoint best_checkpoint.pth --output_dir transvg_unc
python examples/convert_original_checkpoint.py --checkpoint best_checkpoint.pth --output_dir weights --tokenizer none

Nothing in the checkpoint is executed. The script prints each tensor that it does not convert, with the reason.
"""

import argparse
from pathlib import Path

from transformers import BertTokenizer, PreTrainedConfig

from epmvg_hf import EpmVGForVisualGrounding, EpmVGImageProcessor, EpmVGProcessor
from epmvg_hf.model.convert_transvg import convert_transvg, read_transvg_checkpoint


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="The .pth file that TransVG saved.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write.")
    parser.add_argument(
        "--tokenizer",
        default="google-bert/bert-base-uncased",
        help="Folder or Hub id of the tokenizer, which the checkpoint does not have. With none, only the model and an "
        "image processor are written.",
    )
    parser.add_argument(
        "--image_size", type=int, help="Canvas in pixels, for a checkpoint that does not say it; 640 by default."
    )
    arguments = parser.parse_args(command_line)
    if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        raise ValueError(f"{arguments.output_dir} is not empty: expected a new folder")

    tensors, args, unused = read_transvg_checkpoint(arguments.checkpoint)
    model, unused_tensors = convert_transvg(tensors, args, arguments.image_size)
    # This is the evaluation transform of TransVG. It is spelled out so that the folder does not depend on defaults.
    side = model.config.image_size
    processor = EpmVGImageProcessor(size={"height": side, "width": side}, pad_offset=0.5)
    if arguments.tokenizer != "none":
        tokenizer = load_tokenizer(arguments.tokenizer, model)
        length = model.config.max_text_length
        processor = EpmVGProcessor(processor, tokenizer, max_text_length=length, do_lower_case=True)

    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(report(model, len(tensors) - len(unused_tensors), unused | unused_tensors))
    print(f"written to {arguments.output_dir}")


def load_tokenizer(name: str, model: EpmVGForVisualGrounding) -> BertTokenizer:
    """The tokenizer of that name; raises a `ValueError` if there is none or if it has more tokens than the model."""
    try:
        # TransVG uses BERT's tokenizer only. Unlike AutoTokenizer, this class loads a folder with just a vocab.txt.
        tokenizer = BertTokenizer.from_pretrained(name)
    except Exception as error:  # a folder or a download can fail in many ways
        raise ValueError(f"there is no tokenizer in {name}: {error}") from error
    text_config: PreTrainedConfig = model.config.text_config
    vocab_size = text_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{name} has {len(tokenizer)} tokens, but the checkpoint has embeddings for {vocab_size} only"
        )
    if len(tokenizer) < vocab_size:
        print(f"warning: {name} has only {len(tokenizer)} of the {vocab_size} tokens that the checkpoint embeds")
    return tokenizer


def report(model: EpmVGForVisualGrounding, used: int, unused: dict[str, str]) -> str:
    """Describes the model, and lists how many tensors were converted and why the others were not."""
    config = model.config
    resnet: PreTrainedConfig = config.backbone_config
    bert: PreTrainedConfig = config.text_config
    lines = [
        f"ResNet {resnet.depths}, {config.encoder_layers} encoder layers, "
        f"{bert.num_hidden_layers} layers of BERT, {config.fusion_layers} fusion layers, "
        f"{config.image_size} pixels, {config.max_text_length} tokens",
        f"{used} tensors converted; not used:",
        *(f"- {name}: {reason}" for name, reason in unused.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
