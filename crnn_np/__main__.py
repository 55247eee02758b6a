"""``python -m crnn_np``: the command crnn-np."""

from crnn_np.cli import main

if __name__ == "__main__":
    main(prog_name="crnn-np")
