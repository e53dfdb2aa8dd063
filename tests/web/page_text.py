"""A tokenizer as the page reads it, for programs in Node."""

from pathlib import Path

from slm.core.tokenizer import Tokenizer
from slm.web.vocabulary import TABLES_FILE, tokenizer_tables

# Makes `text` of the files that `save_for_page` wrote.
TEXT = """
import { Text, TextStream } from "page/text.js";
import { unpacked } from "page/vocabulary.js";
const json = (name) => JSON.parse(fs.readFileSync(name, "utf8"));
const readText = () => {
  const packed = fs.existsSync("tokenizer.bin");
  const read = packed ? unpacked(new Uint8Array(fs.readFileSync("tokenizer.bin"))) : { rules: json("tokenizer.json") };
  return new Text(read, json("tokenizer_config.json"));
};
const text = readText();
"""


def save_for_page(tokenizer: Tokenizer) -> None:
    """Writes the files of a site's tokenizer to the working directory."""
    tokenizer.save(Path())
    if (tables := tokenizer_tables(tokenizer)) is not None:
        Path(TABLES_FILE).write_bytes(tables)
        Path("tokenizer.json").unlink()
