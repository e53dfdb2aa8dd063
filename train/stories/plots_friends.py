"""Plots about others, near and far from home. The grammar's docstring explains the text."""

from slm.train.stories.grammar import Plot

QUARREL = Plot(
    name="quarrel",
    objects=("ball", "kite", "toy car", "toy boat", "wagon", "drum"),
    places=("park", "garden", "meadow", "beach", "farm"),
    text="""
- {intro} {day}, {he} was playing with {pal} {at}.
- {day}, {full} went {to} to play with {pal}.
- {Full} and {ffull} were good friends. {day}, they were playing {at}.

- There was only one {obj}. "It is mine!" shouted {hero}. "No, it is mine!" shouted {friend}.
- {Hero} had {a thing}. "Can I play with it?" asked {friend}. "No!" said {hero}.
- They found {a thing} {spot3}, and both of them wanted to have it. "I saw it first!" shouted {hero}.

- {Hero} pulled, and {friend} pulled too. Then they both fell down.
- Both of them took the {obj} and pulled. They pulled so hard that they fell down.
- They pulled at the {obj} until it fell into the water.
~
- Now they were both sad. {Hero} sat {spot}, and {friend} sat {spot2}.
- "You are not my friend!" said {hero}. {Friend} began to cry.
- "I will not play with you anymore," said {friend}, and sat down {spot}.

?
- {Hero} had the {obj} now, but it was no fun to play alone.
- Nobody played with the {obj}. It was no fun.
- They did not look at the {obj} anymore, because it was no fun to play alone.
~
- "I am sorry," said {hero}. "I am sorry too," said {friend}.
- After a long time, {hero} went to {friend} and said, "A friend is better than {a obj}. I am sorry."
- "I am sorry," said {hero}, and gave {friend} the {obj}. "You can go first."

- So they took turns with the {obj}.
- They shared the {obj} and played together.
- First {friend} played with the {obj}, and then {hero} played with it.

?
- It was more fun with two.
- They played until it was dark. They were good friends again.
""",
)

SHARE = Plot(
    name="share",
    objects=("cookie", "cake", "pie", "apple", "carrot", "sandwich"),
    places=("park", "meadow", "river", "hill", "beach", "lake"),
    text="""
- {intro} {day}, {he} took {a thing} {to} for lunch.
- {day}, {full} got {a thing} from {parent}. {He} took it {to}.
- {intro} {day}, {he} was sitting {at} with {a thing}, because it was time for lunch.

- {He} saw {pal}. {Friend} had nothing to eat.
- {Pal} was sitting {spot}. "I lost my lunch," said {friend}.
- Then {pal} came along. "I am so hungry," said {friend}.
- {Pal} sat down next to {him}, but {fhe} had no lunch.

?
- {Hero} was hungry too. {He} looked at the {obj}.
- {Hero} wanted to eat the {obj} alone. But {friend} looked so sad.
- The {obj} was not very big, and {hero} had waited for it all morning.
~
- "We can share," said {hero}. {He} gave {friend} half of the {obj}.
- So {he} gave {fhim} half of the {obj}. "Here, this is for you," {he} said.
- But {hero} did not want to eat alone, so {he} gave {friend} half of the {obj}.

- "Thank you!" said {friend}. They sat down and ate together.
- {Friend} ate it all up. "That was so good," {fhe} said.
- They sat in the sun and ate, and it was the best lunch of all.
~
- The next day, {hero} had no lunch. But {friend} had a big pot of soup. "Now I will share with you," {fhe} said.
- The next day, {friend} had a red apple. {Fhe} gave half of it to {hero}.
- When {hero} lost {his} lunch the next day, {friend} gave {him} half of {fhis} bread.

- After that, they always shared their lunch.
- They were both {happy}. It is good to share.
- "Half is better with a friend," said {hero}.
""",
)

STRANGER = Plot(
    name="stranger",
    objects=("basket", "bag", "box", "wagon"),
    places=("hill", "forest", "river", "farm", "meadow"),
    lets={
        "goods": ("apples", "wood", "carrots"),
        "trouble/rescue": (
            '{hero} was out in the rain/said, "Come in and sit by my fire."',
            '{hero} could not find the way home/said, "I know the way. Come with me."',
            "{hero} fell and hurt {his} leg/took {him} home.",
            '{hero} had no lunch/said, "Come in. I have soup for two."',
        ),
    },
    text="""
- {intro} {day}, {he} was going {to}.
- {day}, {full} was going {to} to play with {pal}.
- {intro} {day}, {he} wanted to play with {pal}, who was waiting for {him} {at}.

- {He} saw {a elder} with {a thing} full of {goods}. It was too heavy.
- {He} met {a elder}. "My {obj} is full of {goods}," said the {elder}. "It is too heavy for me."
- On the way, {he} met {a elder} with {a thing}. It was full of {goods}, and the {elder} was very tired.

?
- {Hero} wanted to go and play. But then {he} stopped.
- Nobody helped the {elder}.
- {Hero} did not know the {elder}, but {he} wanted to help.
~
- "I will help you," said {hero}. {He} took the {obj} and went with the {elder}.
- "Can I help you?" asked {hero}. {He} pulled as hard as {he} could. At last, the {obj} was at the {elder}'s house.
- "Give it to me, I am strong," said {hero}, and {he} took the {obj} to the house of the {elder}.

- "Thank you, {hero}," said the {elder}. "You are a good {kind}."
- The {elder} was {happy}. "Thank you!"
- "I will not forget this," said the {elder}.
~
- The next day, {trouble}. The {elder} came along and {rescue}
- Then, one day, {trouble}. The {elder} saw {him} and {rescue}

- "You helped me, and now I can help you," said the {elder}.
- {Hero} was {happy}. Now they were good friends.
- After that, {hero} and the {elder} were friends and often had lunch together.
""",
)

LIE = Plot(
    name="lie",
    objects=("cup", "plate", "lamp", "pot"),
    places=("kitchen", "bedroom"),
    lets={"blame": ("The wind did it", "A bird did it"), "game": ("playing with a ball", "jumping on the table")},
    text="""
- {intro} {day}, {he} was playing {at}.
- {day}, it rained, so {full} played {at}.
- {intro} {day}, it was cold outside, so {he} was playing {at}.

- {He} was {game}. "Be careful," said {mom}. But {hero} did not hear it.
- "Be careful," said {mom}. But {hero} was {game}.
- {Hero} was {game}, and {he} did not look where {he} was going.

- Crash! {Mom}'s {thing} fell down and broke.
- Crash! The {thing} broke.
- Then there was a loud crash, and the {thing} was broken.
~
- {Mom} came in. "Who broke my {obj}?" "{blame}," said {hero}.
- "What happened?" asked {mom}. "It was not me," said {hero}. "{blame}."
- {Mom} looked at the broken {obj}. {Hero} was afraid and said, "{blame}."

- {Hero} was {sad}. {He} had told a lie.
- That night, {hero} could not sleep. {He} thought about the lie.
- {He} went out to play with {pal}, but it was no fun.
- {He} told {pal} about it. "It is better to tell {mom}," said {friend}.
~
- At last, {he} went to {mom}. "I told a lie," {he} said. "I broke the {obj}. I am so sorry."
- "I am sorry," {he} told {mom}. "It was me. I broke your {obj}."
- The next morning, {he} said to {mom}, "I was {game}, and I broke the {obj}."

- "Thank you for telling me," said {mom}, and hugged {him}.
- "I am glad that you told me," said {mom}.
- {Mom} was sad about the {obj}, but {happy} that {hero} did not lie anymore.

- {Hero} and {mom} mended the {obj} together.
- {Hero} was {happy} again. That night, {he} slept well.
- After that, {hero} never told a lie again.
""",
)

PROMISE = Plot(
    name="promise",
    fields="obj/why",
    objects=(
        "book/read a story",
        "pen/write a story",
        "lantern/walk home in the dark",
        "drum/play a song",
        "kite/play with the kite",
        "basket/bring the apples home",
    ),
    places=("garden", "park", "hill", "farm"),
    text="""
- {intro} {Pal} had {a thing}. "Can I have it for a day?" asked {hero}.
- {day}, {full} asked {pal} for {fhis} {thing}.
- {intro} {day}, {he} went to {pal}. "Can I have your {thing} for a day?" {he} asked.

- "Yes," said {friend}, "but I want to {why} tonight. Please bring it {to}." "I promise," said {hero}.
- "Yes," said {friend}. "Please bring it {to} tonight. I want to {why}." "I promise," said {hero}.

?
- {Hero} was very careful with the {obj}.
- {Hero} was {happy}. {He} played all day.
- It was a good day, and the time went by very fast.
~
- That night, it began to rain. {Hero} did not want to go out.
- That night, {hero} was very tired. {He} wanted to go to bed.
- That night, some friends came. "Come and play!" they called.
- When the sun went down, {hero} was in bed. It was so warm there, and it was so cold outside.

- But {he} looked at the {obj}. "I made a promise," {he} said.
- But {friend} was waiting for {him}. "A promise is a promise," said {hero}.
- {He} thought about {friend}, who wanted to {why}, and {he} got up.

- {He} took the {obj} and ran {to}.
- So {he} went {to} with the {obj} as fast as {he} could.
- It was a long way, and it was dark, but {he} did not stop until {he} was there.
~
- "You came!" said {friend}. {Fhe} was {happy}.
- "Here is your {obj}," said {hero}. "Thank you," said {friend}.
- {Friend} was waiting {spot}. "I knew that you would come," {fhe} said.

- Now {friend} could {why}.
- "You are a good friend," {fhe} said.
- "Next time, you can have it for a week," {fhe} said.
""",
)

RACE = Plot(
    name="race",
    objects=("cake", "cup", "bell", "ball"),
    places=("park", "hill", "meadow", "forest", "beach", "lake"),
    text="""
- {intro} {day}, there was a big race {at}. The winner got {a thing}.
- {day}, there was a big race {at}. {Full} wanted to win {a thing}.
- {intro} "There is a race {at}," said {parent}. "Who wins the race gets {a thing}."

- "I will win!" said {pal}. "You are too slow."
- {Pal} laughed. "You are too slow," said {friend}. "I am very fast."
- {Hero} could run fast, but {pal} could run even faster.

- One, two, three! They all began to run. {Friend} was very fast.
- {Hero} ran as fast as {he} could. But {friend} was faster.
- Everyone ran as fast as they could, and soon {friend} was the first and {hero} was right behind {fhim}.
~
- Then {friend} fell and hurt {fhis} leg. Now {hero} could win the {obj}!
- Then {friend} fell into a hole. {Fhe} could not get up.
- Then {friend}, who did not look where {fhe} was going, fell down and hurt {fhis} leg.

- But {hero} stopped and went back. "I will help you," {he} said.
- {Hero} looked at the {obj}. Then {he} looked at {friend} and went back to help {fhim}.
- "Run and win the {obj}!" said {friend}. "No," said {hero}. "I want to help you."

- They went on together. They did not win, but they were {happy}.
- They went on side by side, and they were the last of all.
~
- "I am sorry," said {friend}. "You are a good friend."
- "Thank you," said {friend}. "You are the best."
- "Why did you stop?" asked {friend}. "A friend is better than {a obj}," said {hero}.

?
- {A elder} came and gave {hero} the {obj} for {his} good heart.
- The next day, they ran again, just for fun.
""",
)

STORM = Plot(
    name="storm",
    objects=("barn", "cave", "hut"),
    places=("hill", "meadow", "forest", "farm", "beach"),
    lets={"baby": ("lamb", "bird", "goat")},
    text="""
- {intro} {day}, {he} went for a walk {at}.
- {day}, {full} was playing {at}.

- Then the sky was dark. Boom! It was a big storm.
- Then it began to rain. Boom! "A storm!" cried {hero}.
- The wind was strong, the sky was dark, and soon it began to rain very hard.

- {Hero} was afraid. {He} saw {a thing} and ran as fast as {he} could.
- {Hero} looked around. Not far away, {he} saw {a thing}. {He} ran to it.
- "I have to find a dry place," thought {hero}. Then {he} saw {a thing} and ran inside.
~
- In the {obj}, {he} heard something. It was a little {baby}. It was wet and afraid.
- A little {baby} was sitting in the {obj}. It was lost and cold.
- Somebody was there already. It was a little {baby} that could not find its mother.

- "Do not be afraid," said {hero}. {He} held the {baby} in {his} arms.
- "Come here," said {hero}. {He} sang a song for the {baby}. Now {hero} was not afraid anymore.
- {Hero} told the {baby} a story about {tale}, and they both forgot the storm.
~
- They waited and waited. At last, the storm was over.
- Then the rain stopped, and the sun came out.
- After a long time, the wind was still, and they could go out again.

- The {baby}'s mother came. She was very happy.
- {Hero} took the {baby} home to its mother.
- Outside, the mother was looking for the {baby}. "Thank you!" she said to {hero}.

?
- Then {hero} went home and told {parent} about the storm.
- "You were very brave," said {parent}.
""",
)

HOME = Plot(
    name="way home",
    objects=("butterfly", "bee", "bird"),
    places=("forest", "meadow", "hill", "park", "river"),
    lets={"sign": ("the old tree", "the red barn", "the big stone")},
    text="""
- {intro} {day}, {he} was {at} with {parent}.
- {day}, {full} was playing {at}. "Do not go too far," said {parent}.

- {Hero} saw {a thing}. {He} ran after it.
- {A thing} came along. "Wait for me!" called {hero}, and {he} ran after it.
- There was {a thing}, and it was so pretty that {hero} went after it, on and on.

- Then the {obj} was gone. {Hero} looked around. {He} was lost!
- {He} ran and ran. Then {he} stopped. {He} did not know the way home!
- When {he} stopped at last, {he} was far away, and {he} did not know where {he} was.
~
- "{Mom}! Where are you?" {he} called. But nobody came.
- {Hero} was afraid. {He} sat down {spot} and began to cry.
- It was cold, and soon it would be dark. {Hero} wanted to cry, but {he} did not.

- Then {a elder} came along. "Go to {sign}," said the {elder}. "From there you can find the way home."
- {He} looked around. Then {he} saw {sign}. "I know the way from there!" said {hero}.
- {He} thought about what {mom} had told {him}: "When you are lost, look for {sign}." And there it was!

- {He} went to {sign}. At last, {he} saw {his} house.
- {He} ran to {sign}, and from there {he} found the way home.
- It was a long way from {sign} to {his} house, but {he} did not stop.
~
- {Mom} was waiting at the door and hugged {him}.
- "There you are!" said {mom}, and hugged {him}.
- {Mom} was looking for {him} and was very happy to see {him} again.

- "I am sorry," said {hero}. "I will not run away again."
- That night, {mom} told {him} a story about {tale}.
- {Hero} was {happy}. It is good to be home.
""",
)

TOGETHER = Plot(
    name="together",
    objects=("pumpkin", "carrot", "wagon", "log"),
    places=("garden", "farm", "hill", "meadow"),
    lets={"small": ("little bird", "little bee", "little frog")},
    text="""
- {intro} {day}, {he} found {a thing} {at}. {He} wanted to take it home.
- {day}, {full} was {at}. There was {a thing}, and {he} wanted to take it home.

- {He} pulled as hard as {he} could. But the {obj} was too heavy.
- {He} pulled and pulled. But the {obj} was stuck.
- "I can do it alone," {he} said. {He} tried and tried, but the {obj} was stuck.
~
- {Pal} came along. They pulled together. But the {obj} was still stuck.
- "Can you help me?" {he} asked {pal}. They both pulled, and they both fell down.
- So {he} called {pal}. They pulled until they were both very tired, but it was still stuck.

?
- {Parent} came and pulled too. But it was still too heavy.
- Then {a elder} came and pulled too. But it was still stuck.

- "I can help," said a {small}. "You are too small," said {friend}. "No," said {hero}. "Please help us."
- Then a {small} came along. "I am small, but I am strong," it said.
- A {small} had seen it all. "Can I help too?" it asked. "Yes," said {hero}, "everyone can help."
~
- One, two, three! They all pulled together. Out came the {obj}!
- They all pulled as hard as they could. And then the {obj} was free!
- They pulled once more, all together, and then the {obj} was free, and they all fell down.

- "Thank you!" said {hero}. "We did it together."
- They were all very happy, and the {small} was the happiest of all.
- "You see," said the {small}, "it is good to have small friends too."
""",
)

BIRD = Plot(
    name="bird",
    objects=("bird", "duck", "owl"),
    places=("garden", "park", "forest", "meadow", "farm"),
    without=("cat", "fox"),
    text="""
- {intro} {day}, {he} found {a thing} {at}.
- {day}, {full} heard something {at}. {A thing} was sitting {spot}.

- The {obj} was hurt. It could not fly.
- It was hurt, and it could not fly.
- It wanted to fly away, but it was hurt and fell down again.

- "I will help you," said {hero}, and {he} took the {obj} home.
- {Hero} showed the {obj} to {parent}. "We can help it," said {mom}.
- {Hero} took it in {his} arms and went home to {parent}. "Can we help it?" {he} asked.
~
- {He} put the {obj} in a box with soft grass and gave it some water.
- {Hero} and {pal} made a bed for it in an old box.
- It was very cold, so {hero} gave it {his} soft blanket and sat next to it all night.

- Every day, the {obj} was a little stronger, and soon it was well again.
- {Hero} gave it bread and seeds every day. Soon the {obj} was well again.
- After a week, it could eat bread and seeds, and after two weeks, it was well again.

- Then it wanted to fly. {Hero} was {sad}, but {he} let it go.
- "You have to let it go now," said {mom}. {Hero} was {sad}, but {he} took the {obj} {to}.
~
- The {obj} flew up, up, up. "Come back soon!" called {hero}.
- The {obj} flew away. {Hero} looked after it for a long time.
- It flew over the trees and was gone, but {hero} knew that it was happy.

?
- The next day, the {obj} came back to say hello.
""",
)

PLOTS = (QUARREL, SHARE, STRANGER, LIE, PROMISE, RACE, STORM, HOME, TOGETHER, BIRD)
