"""Settings of `make lab`: a notebook is cleaned when it is saved, so that reading and autosave leave git clean."""

from nbdev.clean import clean_jupyter

c = get_config()  # noqa: F821  (given by Jupyter)


def clean_on_save(path, model, contents_manager, **kwargs):
    """Drop what a kernel and a browser add; the state of widgets is megabytes and means nothing without a kernel."""
    if model["type"] == "notebook":
        model["content"]["metadata"].pop("widgets", None)
    clean_jupyter(path, model, contents_manager=contents_manager, **kwargs)


c.FileContentsManager.pre_save_hook = clean_on_save
