from dmdtrain.cli import main

main()
