"""`phi1 push`: upload an exported model to the Hugging Face Hub."""

from __future__ import annotations

from phi1.arguments import path_option


def main(argv: list[str], parser_class: type) -> int:
    """The command."""
    parser = parser_class("phi1 push", "Upload an exported model to the Hugging Face Hub, in one commit. Log in first "
                          "with `hf auth login`, or set HF_TOKEN.")
    parser.add_argument("export", type=path_option, metavar="EXPORT", help="a model's folder, such as runs/nano/export")
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list the files and upload nothing")
    args = parser.parse_args(argv)

    from phi1.weights.hub import check_repository, files_to_push, push

    check_repository(args.repository)
    if not args.export.is_dir():
        raise ValueError(f"{args.export}: there is no such folder; give an export, such as runs/nano/export")
    if not args.dry_run:
        push(args.export, args.repository, private=args.private)
        return 0
    for path in (files := files_to_push(args.export)):
        print(f"{path.stat().st_size:>15,}  {path.name}")
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes; nothing was uploaded to "
          f"{args.repository}")
    return 0
