"""Load a model, complete a prompt in three ways, and save the model again.

    python examples/load_and_complete.py runs/nano/export
    python examples/load_and_complete.py microsoft/phi-1      # from the Hugging Face Hub
"""

import argparse
import tempfile
from pathlib import Path

import torch

import phi1


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete a prompt with a model.")
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--prompt", default="def area(self):")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    model = phi1.load(args.model)  # on the GPU if there is one, in the file's dtype
    tokenizer = phi1.load_tokenizer(args.model)

    # Greedy: the likeliest token each time.
    (greedy,) = phi1.generate(model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens)
    print(f"--- greedy, ended by {greedy.finish_reason}\n{args.prompt}{greedy}")

    # Sampled: the same seed gives the same text. A completion ends before a stop string.
    (sampled,) = phi1.generate(model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, temperature=0.7,
                               top_p=0.95, seed=1, stop=["\nclass ", "\ndef "])
    print(f"--- sampled, seed {sampled.seed}, ended by {sampled.finish_reason}\n{args.prompt}{sampled}")

    # A batch: prompts of different lengths are decoded together.
    batch = phi1.generate(model, tokenizer, ["import ", "for i in range("], max_new_tokens=args.max_new_tokens)
    print("--- batch", *(f"{len(text.token_ids)} tokens: {text!r}" for text in batch), sep="\n")

    # The saved folder is in Hugging Face's current layout, so transformers loads it as well.
    with tempfile.TemporaryDirectory() as folder:
        phi1.save(model, Path(folder) / "model", tokenizer=tokenizer)
        again = phi1.load(Path(folder) / "model", device=model.embed.weight.device)
    ids = torch.tensor([tokenizer.encode(args.prompt)], device=again.embed.weight.device)
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids)), "the saved model gives other logits"
    print("--- saved and loaded: equal logits")


if __name__ == "__main__":
    main()
