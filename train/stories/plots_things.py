"""Plots about things and about growing up. The grammar's docstring explains the text."""

from slm.train.stories.grammar import Plot

LOST = Plot(
    name="lost",
    objects=("ball", "hat", "scarf", "teddy bear", "book", "toy car", "bell"),
    places=("park", "garden", "beach", "forest", "meadow", "hill", "farm"),
    lets={"junk": ("an old shoe", "a wet leaf", "a round stone")},
    text="""
- {intro} {He} had {a thing}. {He} took it everywhere.
- {intro} {He} loved {his} {thing} very much.
- {Full} got {a thing} from {parent}. {Hero} was {happy}.

- {day}, {he} went {to} with the {obj}. {He} played there all day.
- {day}, {hero} was playing {at}. {He} ran and jumped until {he} was tired.
- {day}, {he} and some friends went {to}, where they ran and jumped until the sun went down.

- When it was time to go home, {hero} looked around. The {obj} was gone!
- Then {hero} stopped. The {obj} was not there!
- On the way home, {hero} stopped, because {he} did not have the {obj} anymore!
~
- "Oh no! Where is my {obj}?" cried {hero}.
- {Hero} was {sad}. "I lost my {obj}," {he} said.
- {Hero} began to cry, because {he} had lost the best thing that {he} had.

- {Pal} came along. "Do not cry," said {friend}. "I will help you."
- "I will help you to look," said {pal}.
- "Why are you so sad?" asked {pal}, and {hero} told {fhim} about the {obj}. "I will help you," said {friend}.

- They looked {spot2}, but there was only {junk}.
- First they looked {spot2}. The {obj} was not there.
- {Hero} looked {spot2} and {friend} looked {spot3}, but all they found was {junk}.
~
- Then {friend} looked {spot}. "Look, {hero}! Here is your {obj}!"
- Then {hero} saw something {spot}. It was the {obj}!
- "Wait!" said {hero}. "I was sitting {spot}." {He} ran back as fast as {he} could, and there was the {obj}.

- "Thank you, {friend}," said {hero}. "You are a good friend."
- {Hero} hugged the {obj} and laughed. They went home together.
- {Hero} was {happy}. That night, {he} took the {obj} to bed.
""",
)

FOUND = Plot(
    name="found",
    objects=("key", "ring", "bell", "book", "hat", "bag"),
    places=("park", "garden", "forest", "meadow", "hill", "river", "beach"),
    lets={"gift": ("a big cookie", "a red apple", "a piece of cake")},
    text="""
- {intro} {day}, {he} went for a walk {at}.
- {day}, {full} was playing {at}.

- {He} saw something {spot}. It was {a thing}!
- Something was lying {spot}. {He} looked at it. It was {a thing}.
- When {he} sat down to rest, {he} saw {a thing} {spot}.

- "What a nice {obj}!" said {hero}. "But it is not mine."
- {Hero} wanted to keep the {obj}. But it was not {hers}.
- {Hero} liked the {obj} very much, but {he} knew that somebody was looking for it.
~
- First {he} asked {pal}. "No, it is not mine," said {friend}.
- {He} showed the {obj} to {parent}. "Somebody must be looking for it," said {mom}.

- Then {a elder} came along. "I lost my {obj}," said the {elder}. "It is {adj}. Did you see it?"
- Then {he} saw {a elder} who looked {sad}. "Did you lose something?" asked {hero}. "Yes, my {obj}!" said the {elder}.

- {Hero} gave the {obj} back. The {elder} was {happy}.
- "Here it is!" said {hero}, and gave the {obj} back.
- "Is this your {obj}?" asked {hero}. "Yes, it is!" said the {elder}.
~
- "Thank you!" said the {elder}, and gave {him} {gift}.
- The {elder} laughed. "You are a good {kind}. Here is {gift} for you."
- The {elder} thanked {him} and gave {him} {gift}, because {he} was such a good {kind}.

?
- {Hero} went home and was {happy} too.
- {Hero} shared it with {pal}.
""",
)

MENDED = Plot(
    name="mended",
    fields="obj/part/fix",
    objects=(
        "toy car/wheel/put the wheel back",
        "wagon/wheel/put the wheel back",
        "kite/tail/tied on a new tail",
        "toy boat/sail/made a new sail",
        "doll/arm/put the arm back",
        "teddy bear/ear/put the ear back",
    ),
    places=("park", "garden", "beach", "meadow", "hill", "farm"),
    text="""
- {intro} {He} had {a thing} and played with it every day.
- {Full} had {a thing}. {He} loved it very much.
- {intro} The best thing that {he} had was {a thing} from {parent}.

- {day}, {he} took the {obj} {to}. {He} ran too fast and fell. The {part} broke off!
- {day}, {he} was playing with it {at}. {He} pulled too hard, and the {part} broke off!
- {day}, when {he} was playing with it {at}, it fell on a stone, and the {part} broke off.
~
- "Oh no, my {obj} is broken!" {he} cried.
- {Hero} looked at the broken {obj} and was {sad}.
- {Hero} sat down and cried, because the {obj} was broken.

?
- "You can get a new one," said {pal}. "I do not want a new one," said {hero}.
- {He} tried to put the {part} back, but it fell off again.

- {He} went to {parent}. "Can you help me?" {he} asked.
- {He} showed it to {parent}. "We can mend it," said {mom}.
- {Parent} saw that {he} was {sad}. "Show me the {obj}," said {mom}. "We can mend it together."
~
- {Mom} helped {him}, and {he} {fix}.
- They sat down at the table. {Mom} showed {him} how, and {hero} {fix}.
- It was not easy, and it took a long time, but at last {hero} {fix}.

- Now the {obj} was as good as new. "Thank you!" said {hero}.
- "Look, it is as good as new!" said {hero}. {He} hugged {mom}.
- {Hero} was {happy}, and {he} loved the {obj} even more than before.

?
- The next day, {he} played with it {at} again.
- After that, {he} was very careful with the {obj}.
""",
)

SEED = Plot(
    name="seed",
    fields="obj/crop/use",
    objects=(
        "sunflower/a tall yellow sunflower/gave the seeds to the birds",
        "pumpkin/a big orange pumpkin/made a big pot of soup",
        "carrot/a long orange carrot/ate it for lunch",
        "rose/a pretty red rose/put it on the table",
        "bean/a tall green bean plant/made a big pot of soup",
    ),
    places=("garden", "hill", "meadow", "farm"),
    text="""
- {intro} {day}, {parent} gave {him} a {obj} seed.
- {day}, {full} found a {obj} seed {at}.
- {intro} {day}, {he} got a {obj} seed from {pal}.

- {Hero} planted the seed {at} and gave it some water.
- {He} made a hole {at} and put the seed in. Then {he} gave it some water.
- {Hero} went {to} with the seed, made a little hole {spot} and put it in.

- {He} looked at it every day, but nothing happened.
- {He} sat next to it and waited. {He} told it a story about {tale}. But nothing happened.
- The next morning, {he} ran {to} to look at it, but there was nothing to see.
~
- "Why does it not grow?" asked {hero}. "You have to wait," said {mom}.
- "My seed is no good," said {hero}. "Do not give up," said {pal}.

- So {hero} waited and gave it water every day.
- It was hot, and {hero} gave it more water.
- When it was hot, {hero} gave it water, and when it was cold, {he} put grass on it.

- Then, one morning, {he} saw a small green leaf! "Look!" {he} cried.
- At last, a small green leaf came up. {Hero} jumped for joy.
- One day, after the rain, {he} found a small green leaf, and {he} was {happy}.
~
- The plant grew and grew. Soon it was {crop}.
- Every day it was a little bigger. At last, it was {crop}.

- {Hero} and {pal} {use}.
- {Hero} and {mom} {use}. They were very happy.
""",
)

SURPRISE = Plot(
    name="surprise",
    fields="obj/make",
    objects=(
        "picture/painted a picture of the sun",
        "cake/made a cake with honey",
        "hat/made a hat from soft wool",
        "scarf/made a scarf from soft wool",
        "kite/made a kite from paper and string",
        "basket/made a basket from long grass",
    ),
    places=("garden", "park", "meadow", "beach"),
    text="""
- {intro} {His} best friend was {friend}. Soon it was {friend}'s birthday.
- {day}, {full} had a plan. It was the birthday of {pal}.

- {Hero} wanted to make a surprise for {fhim}. So {he} {make}.
- "I will make something for {friend}," said {hero}. And {he} {make}.
- "What can I give {fhim}?" thought {hero}. {He} worked all day, and at last {he} {make}.

?
- Then {friend} came to the door. {Hero} hid the {obj}. "What do you have there?" asked {friend}. "Nothing," said {hero}.
- {Friend} wanted to play. "Not today," said {hero}. {Friend} was {sad}. {Fhe} did not know about the surprise.
~
- All the friends hid {at}. When {friend} came, they jumped out. "Surprise!" they shouted.
- {Hero} took {friend} {to}. All the friends were there. "Happy birthday!" they shouted.
- {Friend} thought that nobody knew about {fhis} birthday. But when {fhe} went {to}, all the friends were there.

- {Hero} gave {fhim} the {obj}. "Did you make this for me?" asked {friend}.
- "This is for you," said {hero}, and gave {fhim} the {obj}.
- {Hero} came with the {obj}. "I made this for you," {he} said.
~
- {Friend} laughed. "It is the best {obj} of all," {fhe} said.
- {Friend} was {happy} and hugged {hero}.
- {Friend} hugged {him}. "I love it, because you made it," {fhe} said.

?
- They played and laughed all day.
- They all ate together and sang a song.
""",
)

DARK = Plot(
    name="dark",
    objects=("lantern", "lamp", "teddy bear", "blanket"),
    places=("bedroom", "tent"),
    lets={
        "noise/cause": (
            "Tap, tap, tap/a branch in the wind",
            "Drip, drip, drip/the rain on the leaves",
            "Hoo, hoo/an owl in the tree",
            "Bump, bump/an old door in the wind",
        ),
    },
    text="""
- {intro} {He} was afraid of the dark.
- {Full} did not like the night. {He} was afraid of the dark.
- {intro} When the sun went down, {he} was always afraid, because {he} did not like the dark.

- "Good night, {hero}," said {parent}. {Hero} lay down {at}.
- "Please tell me a short story," said {hero}. So {parent} told {him} a story about {tale}. Then {mom} said good night.
- "I want to hear a story," said {hero}. "Can you make up a little story in which nobody is afraid?" {Parent} told
  {him} one and said good night.

- Then {he} heard something. {noise}! What was it?
- {noise}! "What is that?" asked {hero}.
- It was dark. {noise}! Something was there, and {hero} sat up in bed.
~
- "{Mom}, I am afraid!" {he} called. {Mom} came with {a thing}. "Take the {obj}, and we will look," said {mom}.
- {He} took {his} {thing}. Now {he} was not so afraid. "I will go and look," {he} said.
- {Hero} held {his} {thing} and thought, "I will be brave." Then {he} went to look.

- {Hero} looked {spot}, but nothing was there. Then {he} saw it. It was only {cause}!
- {Hero} held the {obj} and looked out. It was only {cause}!
- {He} looked {spot2} and {spot3}, and there it was. It was only {cause}!
~
- {Hero} laughed. "I am not afraid of that," {he} said.
- "So it was you!" said {hero}.
- {He} was {happy} that it was nothing bad.

- {He} went back to bed with the {obj} and slept well.
- After that, {hero} was not afraid of the dark anymore.
- The next day, {he} told {pal} about it. "The dark is not so bad," {he} said.
""",
)

SWIM = Plot(
    name="swim",
    objects=("board", "log", "ball"),
    places=("lake", "river", "beach"),
    text="""
- {intro} {He} wanted to learn to swim, but {he} was afraid of the water.
- {day}, everyone was swimming {at}. But {full} sat {spot}. {He} could not swim.
- {day}, {full} went {to} with some friends. They all went into the water, but {hero} could not swim.

- "Come in, {hero}!" called {pal}. "No, I am afraid," said {hero}.
- {Pal} was in the water. "Come in!" called {friend}. But {hero} did not want to.

- "I can help you," said {friend}. {Fhe} gave {him} {a thing}.
- {Friend} gave {him} {a thing}. "Hold on to the {obj}," {fhe} said.
~
- {Hero} held the {obj} and went into the water. {He} kicked and kicked.
- {Hero} took the {obj} and kicked as hard as {he} could.
- The water was cold, but {hero} held the {obj} and kicked until {he} was tired.

- "It is too hard," said {hero}. "Try again," said {friend}. So {he} tried every day.
- {He} got water in {his} nose. But {he} did not give up.
- Every day, {hero} and {friend} went {to}, and every day it was a little better.

- Then, one day, {he} let go of the {obj}. {He} did not go down!
- One day, {friend} said, "Now let go." And {hero} let go of the {obj}.
- Then, one day, the {obj} was gone, but {hero} did not stop. {He} could swim without it!
~
- "Look at me! I can swim!" {he} shouted.
- "You can swim!" shouted {friend}. {Hero} was {happy}.
- {Friend} was {happy}. "You did it!" {fhe} shouted.

?
- After that, {hero} was in the water every day.
- "Thank you, {friend}," said {hero}.
""",
)

RIDE = Plot(
    name="ride",
    objects=("bike", "scooter"),
    places=("park", "meadow", "hill", "farm"),
    text="""
- {intro} {day}, {parent} gave {him} {a thing}. {He} wanted to learn to ride it.
- {Full} had {a thing}, but {he} could not ride it.
- {intro} {He} had {a thing}, but {he} was afraid to ride it.

- {He} took the {obj} {to} and got on. Bump! {He} fell off.
- {He} tried it {at}. {He} got on, and then {he} fell down.
- {day}, {he} tried to ride it {at}, but {he} fell off and hurt {his} leg.

- "It is too hard," {he} said. {He} sat down {spot} and was {sad}.
- "I will never learn it!" cried {hero}.
- {Hero} was {sad} and wanted to go home.
~
- {Pal} came along. "Try again," said {friend}. "I will help you."
- "I fell off too," said {pal}. "Do not give up."
- {Pal} helped {him} up. "It is not easy," said {friend}, "but you can learn it."

- So {hero} tried again. {He} fell off, and {he} got up again.
- {Hero} got on again. {He} tried every day and did not give up.
- They went {to} every day, and every day {hero} fell off, but {he} always got on again.

- Then, one day, {he} did not fall. "Look at me! I can ride!" {he} shouted.
- At last, {he} could do it. "I can ride!" {he} shouted.
- Then, when nobody was helping {him}, {he} could ride the {obj} all alone.
~
- {Friend} was {happy} too. "You did it!" {fhe} said.
- {Hero} went home on the {obj}. {Parent} was {happy} too.

?
- After that, {hero} went {to} with the {obj} every day.
- Now {he} had learned to ride.
""",
)

STUCK = Plot(
    name="stuck",
    objects=("kite", "ball", "hat", "scarf"),
    places=("park", "garden", "meadow", "hill", "farm"),
    text="""
- {day}, {full} took {his} {thing} {to}.
- {intro} {day}, {he} was playing with {a thing} {at}.

- Then a strong wind came. The {obj} flew up and got stuck in a tree.
- The wind took the {obj}. Up, up, up! Now it was stuck in a tree.
- It was fun, until the wind took the {obj} and it got stuck in a big tree.

- "My {obj}!" cried {hero}. {He} jumped, but {he} was too small.
- {Hero} wanted to climb the tree, but {he} fell down.
- {Hero} looked up at the {obj} and did not know what to do.
~
- {Pal} came with a long stick. But the stick was too short.
- "Climb on my back," said {pal}. But they were still too small.
- {Pal} pulled at the tree as hard as {fhe} could, but the {obj} did not come down.

- Then a bird came along. "Can you help us?" asked {hero}. "My {obj} is stuck in the tree."
- "Why are you so sad?" asked a little bird. "My {obj} is stuck," said {hero}.

- The bird flew up and pulled. Down came the {obj}!
- "I can help you," said the bird. It flew up and pulled the {obj} out of the tree.
- "That is easy for me," said the bird, and soon the {obj} was back on the ground.
~
- "Thank you!" said {hero}, and gave the bird some bread.
- {Hero} was {happy}. "Thank you, little bird!" {he} said.
- {Hero} held the {obj} in {his} arms, and the bird sang a song for them.
""",
)

MOON = Plot(
    name="moon",
    objects=("bucket", "net", "basket", "pot"),
    places=("river", "lake"),
    text="""
- {intro} One night, {he} was {at}. {He} saw the moon in the water.
- One night, {full} went {to}. The moon was in the water, big and yellow.

- "The moon fell into the water!" {he} cried. "I will get it out."
- "What a pretty moon!" said {hero}. "I want to take it home."
- {Hero} thought that the moon was lost, and {he} wanted to help it.

- {He} took {a thing} and put it into the water.
- {He} ran home and came back with {a thing}.
- So {he} took {a thing} and went very close to the water.
~
- Splash! {Hero} pulled out the {obj}. There was only water in it.
- {He} tried and tried, but there was no moon in the {obj}.
- The moon was gone. Then the water was still, and the moon was there again.

- "What are you doing?" asked {pal}. "I want the moon," said {hero}.
- {Pal} came along. "The moon does not like me," said {hero}.

- {Friend} laughed. "Look up!" {fhe} said. The moon was up there, big and yellow.
- "Look up," said {friend}. "The moon is not in the water. It is up there."
~
- They sat down {spot} and looked at the moon together.
- "Now I know where it lives," said {hero}, and they went home together.
- Then {hero} had to laugh. "The moon is too big for a {obj}!" {he} said.
""",
)

PLOTS = (LOST, FOUND, MENDED, SEED, SURPRISE, DARK, SWIM, RIDE, STUCK, MOON)
