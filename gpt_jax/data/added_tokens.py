"""Tokens added to a vocabulary after it was learned, such as the marks of a chat: where they are listed, and their ids.

A Hugging Face directory lists them in tokenizer.json (`added_tokens`), tokenizer_config.json (`added_tokens_decoder`,
and special ones by their role), added_tokens.json and special_tokens_map.json. All of them end up in the one
tokenizer.json that a checkpoint carries.
"""

import pathlib
from typing import Any

from gpt_jax.errors import InputError
from gpt_jax.files import read_json

# The flags of an added token, as `tokenizers` has them, and what they are where a file is silent.
FLAGS = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': True, 'special': False}
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
LISTS_OF_ROLES = ('additional_special_tokens', 'extra_special_tokens')


def add_listed(document: dict[str, Any], folder: pathlib.Path, room: int | None, always: str) -> dict[str, Any]:
    """A tokenizer.json with the tokens that the other files of its folder list.

    What several files list, tokenizer_config.json describes first, then tokenizer.json, as in transformers. Tokens
    that are special by their role alone and have no id get the next ones, where the model is known to have them.

    Args:
      document: a tokenizer.json, known to be one.
      folder: of a Hugging Face directory.
      room: ids that the model has; tokens without an id that find no room are left out. None: all of them are.
      always: a special token that is one whatever the files say.

    Raises:
      InputError: a file is no JSON, or does not list tokens as Hugging Face's do.
    """
    config, ids, roles = (
        _read(folder / name) for name in ('tokenizer_config.json', 'added_tokens.json', 'special_tokens_map.json')
    )
    by_role = [_described(value) for key, value in (config | roles).items() if key in ROLES and value is not None]
    by_role.append(_described(always))
    for key in LISTS_OF_ROLES:
        for source in (config, roles):
            listed = source.get(key) or ()
            listed = listed.values() if isinstance(listed, dict) else listed
            by_role += map(_described, listed)
    special = {token['content']: token | {'special': True} for token in by_role}
    added = {}
    for content, id_ in ids.items():
        described = special.get(content) or _described({'content': content})
        added[content] = FLAGS | described | {'id': _id(id_, 'added_tokens.json')}
    added |= {token['content']: token for token in document.get('added_tokens') or ()}
    for id_, token in (config.get('added_tokens_decoder') or {}).items():
        token = _described(token)
        added[token['content']] = FLAGS | token | {'id': _id(id_, 'tokenizer_config.json')}
    model = document['model']
    known = (
        model['vocab']
        if isinstance(model['vocab'], dict)
        else {token: n for n, (token, _) in enumerate(model['vocab'])}
    )
    following = 1 + max([*known.values(), *(token['id'] for token in added.values())], default=-1)
    for content, token in special.items():
        if content in added:
            added[content] = added[content] | {'special': True}
        elif content in known and content != model.get('unk_token'):
            added[content] = FLAGS | {'normalized': False} | token | {'id': known[content]}
        elif content not in known and room is not None and following < room:
            added[content] = FLAGS | {'normalized': False} | token | {'id': following}
            following += 1
    return document | {'added_tokens': sorted(added.values(), key=lambda token: token['id'])}


def place(document: dict[str, Any], ids: dict[str, int]) -> dict[str, Any] | None:
    """A tokenizer.json whose added tokens get the ids that they are listed with; None where they do anyway.

    `tokenizers` numbers added tokens through from the end of the vocabulary, whatever their ids are, unless the
    vocabulary has them. A vocabulary that leaves ids out, such as one of a resized model, so has to have them.

    Args:
      document: the tokenizer.json.
      ids: of all tokens, as `tokenizers` has numbered them.

    Raises:
      InputError: a token is listed with the id of another one.
    """
    added, vocabulary = document.get('added_tokens') or [], document['model']['vocab']
    if all(ids.get(token['content']) == token['id'] for token in added) or not isinstance(vocabulary, dict):
        return None
    holder = {id_: content for content, id_ in vocabulary.items()}
    missing = {token['content']: token['id'] for token in added if token['content'] not in vocabulary}
    for content, id_ in missing.items():
        if holder.setdefault(id_, content) != content:
            raise InputError(f'the tokenizer gives id {id_} to both {holder[id_]!a} and {content!a}: use another one')
    if not missing:
        return None  # what the vocabulary has keeps its id there, in transformers as well
    return document | {'model': document['model'] | {'vocab': vocabulary | missing}}


def _read(path: pathlib.Path) -> dict[str, Any]:
    content = read_json(path) if path.exists() else {}
    lists = [content.get(key) or {} for key in LISTS_OF_ROLES] if isinstance(content, dict) else [None]
    if not all(isinstance(listed, dict | list) for listed in lists):
        raise InputError(f'{path} does not list tokens as it should; put the file there that came with the model')
    if not isinstance(content.get('added_tokens_decoder') or {}, dict):
        raise InputError(f'{path}: added_tokens_decoder is no JSON object; put the file there that came with the model')
    return content


def _described(token: Any) -> dict[str, Any]:
    """Content and flags of a token that is described in full, or by its content alone, as a special one."""
    if isinstance(token, str):
        token = {'content': token, 'special': True, 'normalized': False}
    if not isinstance(token, dict) or not isinstance(token.get('content'), str) or not token['content']:
        raise InputError(f'added token {token!r:.60}: has no content; take the files that came with the model')
    flags = {name: token[name] for name in FLAGS if name in token}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(f'added token {token["content"]!a}: its flags {flags} must be true or false')
    return {'content': token['content'], **flags}


def _id(value: Any, name: str) -> int:
    """An id, which the keys of a JSON object write as a string."""
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise InputError(
            f'{name}: token id {value!r:.60} is no int32 from 0 on; take the files that came with the model'
        )
    return int(text)
