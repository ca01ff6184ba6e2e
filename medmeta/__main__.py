from medmeta.cli import main

main()
